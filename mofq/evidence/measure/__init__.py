"""Fills the table: every scheme of every fusion group, from statistics and streamed weights."""
