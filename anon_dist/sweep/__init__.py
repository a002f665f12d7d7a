"""A grid of trainings, so that γ is found in an afternoon.

    anon-dist sweep --config quickstart --out runs/gamma --grid optim.gamma=-0.5:1.5:0.25 optim.lr=log:1e-3:1e-2:4 \\
        --seeds 3 --baseline adamw --match-rms
    anon-dist sweep report runs/gamma

`grid.py` turns that into cells, each one training of the loop in `anon_dist.train`; `cells.py` is a cell's folder and what became of it;
`run.py` runs them side by side, with `early.py`'s rule for stopping the hopeless; `calibrate.py` measures how the learning rate has to
change with γ (the mathematics is `anon_dist.optim.matching`); `results.py`, `plots.py` and `report.py` say what came out.

A sweep's folder:

    sweep.json              what all its cells share, and each command that worked on it
    cells/NAME/cell.json    a cell's settings; beside it the run's own files (metrics.jsonl, result.json, …)
    cells/NAME/outcome.json finished, stopped or failed, and why; while it is not there, the same command goes on with the cell
    cells/NAME/log.txt      what the run printed
    calibration/            --match-rms: a short run at γ = 1, and the spectrum of its moments
    report.md, report.html, cells.csv, *.png
"""
