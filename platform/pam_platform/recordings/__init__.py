"""Recordings: taken in from agents, verified, and shown to those who may see them."""
