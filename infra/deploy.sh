#!/bin/sh
# What Prefect has to know before it runs anything: the work pool, the deployments and the automation.
# A second time does no harm. `python -m infra up` does the same on one machine (a test compares the two).
set -eu

: "${LENET_STORAGE:?is not set: where runs are published, e.g. s3://bucket/prefix}"
: "${LENET_RAY_ADDRESS:?is not set: where Ray is, e.g. http://lenet-head-svc:8265}"

prefect --no-prompt work-pool create lenet --type process --base-job-template infra/work-pool.json --overwrite
prefect --no-prompt deploy --name train-lenet/train-lenet \
    --param "storage=$LENET_STORAGE" --param "ray_address=$LENET_RAY_ADDRESS"
prefect --no-prompt deploy --name predict-lenet/predict-lenet \
    --param "model=$LENET_STORAGE" --param "ray_address=$LENET_RAY_ADDRESS"
prefect --no-prompt deploy --name retention/retention --param "storage=$LENET_STORAGE"
# Prefect would take an automation of the same name a second time: those of a version before go first.
for name in $(sed -n 's/^  - name: //p' infra/automations.yaml); do
    prefect --no-prompt automation delete "$name" > /dev/null 2>&1 || true
done
prefect --no-prompt automation create --from-file infra/automations.yaml
