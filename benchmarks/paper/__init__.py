"""The paper's findings, looked for in the two embedded models: figures 2, 3, A1 and A4, tables 1, 2, 6 and A1 to A5.

    python -m benchmarks.paper.run --model mini-pixart --bundle BUNDLE --output paper-mini-pixart.json
    python -m benchmarks.paper.page

The first resumes: what a file of the same settings holds already is not computed again. The second makes docs/paper.md
and its pictures.
"""
