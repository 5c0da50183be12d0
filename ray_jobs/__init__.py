"""Ray jobs around loko: prepare, train, tune, report. Each runs as ``python -m ray_jobs.NAME``."""
