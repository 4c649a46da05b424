"""Studies: claims about the method as files. Variants of a recipe are trained with several seeds, and claims judged."""
