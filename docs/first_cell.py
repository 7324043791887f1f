"""The first cell of each tutorial's page: below every cell the page then shows its saved pictures.

The scripts open no windows. All names are local, because a tutorial may use the same names.
"""


def show_pictures():
    """Displays new pictures after every cell."""
    import pathlib

    from IPython import get_ipython
    from IPython.display import Image, display

    shown = set()

    def show_new(_):
        saved = set(pathlib.Path().rglob("*.png")) - shown
        shown.update(saved)
        for picture in sorted(saved, key=lambda path: path.stat().st_mtime_ns):
            display(Image(picture))

    get_ipython().events.register("post_run_cell", show_new)


show_pictures()
