"""Trains and compares several runs."""
