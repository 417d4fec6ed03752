"""The fine-tuner under its old name: `python scripts/fine_tuner.py --input … --model … --topics …`, or imported."""

from pipeline.fine_tuner import FineTuner, main

__all__ = ["FineTuner", "main"]
if __name__ == "__main__":
    raise SystemExit(main())
