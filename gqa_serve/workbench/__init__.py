"""Tools around the engine that answer what a choice costs. Nothing here is imported while serving."""
