"""`qwenvl upload` as a script, for a checkout that is not installed.

    python hub_upload.py runs/mine/final me/my-qwen-vl            # dry run: builds, checks, lists; sends nothing
    python hub_upload.py runs/mine/final me/my-qwen-vl --upload   # creates the repository (private) and sends it

What happens stands in docs/publish.md, and in trainers/publish.py.
"""

import typer

from trainers.cli_publish import upload

if __name__ == "__main__":
    typer.run(upload)
