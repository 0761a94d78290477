"""Eligibility gates: what may be asked at all, before anything is scored."""
