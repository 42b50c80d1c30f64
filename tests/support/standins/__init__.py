"""Programs that a test starts in the place of Penstock's own: each is the real one with one thing taken away or added.

Fleet(tmp_path, instead={"frontend": "tests.support.standins.stale_frontend"})
"""
