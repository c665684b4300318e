//! The parser of a run's metrics, for fuzzers.

/// A run's `metrics.jsonl`.
pub mod metrics {
    use std::path::Path;

    use super::super::results::Results;

    const SAMPLES: u64 = 1000;

    /// Lines of steps: whole, cut off, and with more samples than can be counted.
    pub fn seeds() -> Vec<Vec<u8>> {
        let line = |step: u64, batch_samples: u64, samples_seen: u64| {
            serde_json::json!({
                "step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "batch_samples": batch_samples, "batch_tokens": 1024,
                "samples_seen": samples_seen, "tokens_per_s": 100.0, "step_ms": 5.0, "exposed_ms": 0.5, "bytes_sent": 9,
                "collectives": 13, "noise_scale": null, "wanted_batch": null, "validation_loss": 2.0, "flops": 1e9
            })
        };
        let [first, second, absurd] = [line(1, 8, 8), line(2, 8, 16), line(2, u64::MAX, 7)];
        [format!("{first}\n{second}\n"), format!("{first}\n{{\"step\":2,"), format!("{first}\n{absurd}\n")]
            .map(String::into_bytes)
            .into()
    }

    /// Steps that are read follow each other.
    pub fn check(data: &[u8]) {
        let Ok(text) = str::from_utf8(data) else { return };
        let Ok(results) = Results::parse(Path::new("metrics.jsonl"), text, SAMPLES) else { return };
        let seen: u64 = results.steps.iter().map(|line| line.batch_samples).sum();
        assert_eq!(results.samples_seen(), seen);
        assert_eq!(results.steps.last().map_or(0, |line| line.step), results.steps.len() as u64);
        let parts = results.parts(10);
        assert_eq!(parts.iter().all(Option::is_none), results.steps.is_empty());
        let _ = (results.is_finished(), results.median_per_sample(), results.training_loss(), results.warmup_steps());
    }
}
