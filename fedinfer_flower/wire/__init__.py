"""How queries and answers travel in Flower messages."""
