"""The functions of `import maskdiff`, for notebooks and other programs.

Each function takes the Model that `maskdiff.load` returns, and calls the rooms
above. docs/library.md shows them. Functions check their arguments, enter the
mesh of the model, and compile once for all calls with equal shapes.
"""
