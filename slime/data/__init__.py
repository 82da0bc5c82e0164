"""Segment large sets of images, read annotations, and write the formats of annotation tools.

``python -m slime`` (:mod:`.command`) is the way in. The road: a source (:mod:`.sources`) gives named bytes, which
become pixels (:mod:`.pixels`); :mod:`.run` sends them through a :class:`slime.Segmenter` and notes what was found as
records (:mod:`.records`) in a run_log, of which :mod:`.formats` makes files. Needs the extra ``data``.
"""
