"""What a run records, and the report that shows it.

- metrics: rows of `metrics.jsonl`, TensorBoard and wandb; model FLOPs
  utilization.
- tensorboard: event files for TensorBoard.
- wandb_run: the wandb run that receives the same rows.
- terminal: progress bar and tables of text.
- ledger: records where the wall time of a run goes; computes goodput.
- skipped: messages about updates that the guard skipped.
- history: reads a run back from its work directory.
- stage_file: the stage of a run and its panels, `stage.json`.
- metrics_file: reads `metrics.jsonl`.
- run_files: reads `config.json`, `header.txt` and `plan.json`.
- json_lines: reads JSON lines files; checks of their numbers.
- smoothing: smooths and thins series.
- traces: runs as Plotly traces, and axis ranges.
- panel: a figure with its title, note and menu.
- curves: all panels of the report; figures of metrics over time, goodput.
- loss_curves: figures of the losses.
- loss_parts: figures of the loss by mask ratio and by position in a window.
- report: the HTML report of launch/report.py.
"""
