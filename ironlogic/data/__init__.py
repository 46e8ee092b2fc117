"""Conversations, pictures and problems: read, checked, masked."""
