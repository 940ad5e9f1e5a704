"""From the queue to the settled job: batches, workers, deadlines, attempts."""
