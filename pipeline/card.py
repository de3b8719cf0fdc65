"""The model card of a run: Markdown in the form that Hugging Face reads, with nothing asked of the network."""

from pipeline.report import Report


def render_card(report: Report) -> str:
    """The card. Placeholder until the page is done."""
    return f"# {report.run_id}\n"
