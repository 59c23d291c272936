"""How weights are rounded: a method a file. The table of methods is :data:`METHODS`; :class:`Method` is their base."""
