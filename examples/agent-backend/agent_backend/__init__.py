"""A Flower AgentApp whose model is a federation."""
