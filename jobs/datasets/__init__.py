"""Datasets: uploads, validation in a sandbox, versions and reports."""
