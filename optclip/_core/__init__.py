"""What clipping, projections and initializers all stand on; nothing here is public.

Numbers and their rounding, checks and messages, paths, layouts, meshes, groups of
leaves and their sizes. It imports none of the packages beside it.
"""
