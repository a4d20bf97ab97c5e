"""Region features of pictures: the published files and formats, converters to them, and where features come from.

`precomputed` reads and writes the files that SCAN published and VSE-infinity uses, with `ragged` for sets of different
sizes and `verify` for what may be wrong with them. They are made by `bottom_up` (bottom-up attention's TSV) and
`karpathy` (captions and splits), by `extraction` with torchvision's `detector`, or, for the embedded scenes, from
`grid_cells` of EfficientNet.
"""
