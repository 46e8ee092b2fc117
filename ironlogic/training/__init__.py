"""Stages of training and the folders they write."""
