"""The model: densities, networks, objectives and likelihood estimates."""
