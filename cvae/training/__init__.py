"""How weights change: the optimizer, the weights as one vector, their average."""
