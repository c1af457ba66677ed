"""Trains and compares several runs: demo, sweeps, controls, reports and plots."""
