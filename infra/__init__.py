"""Deployment: what runs the pipeline, on one machine or many. Nothing imports it."""
