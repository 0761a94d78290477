"""Logs, audit logs, metrics and traces, none of which carry what was asked."""
