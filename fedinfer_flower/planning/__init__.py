"""What is fixed before a query leaves: label space, class totals, rule, question.

The coordinator plans where it asks for itself; a querier who seals its queries plans
alone, from the sites' signed profiles.
"""
