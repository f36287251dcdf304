//! `scripts/bench-report`, which turns what a GPU measured into documentation; it needs a Python.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

const CARD: &str = "NVIDIA H100 80GB HBM3";

/// What a bundle writes where PyTorch's eager step takes so many times as long as ours.
fn summary(times: f64) -> Value {
    let tokens = 8448;
    let row = |operation: &str, device: &str, seconds: f64| {
        json!({
            "operation": operation, "scale": "paper", "tokens": tokens, "device": device, "precision": "bf16",
            "seconds": seconds, "operations": 9e11, "bytes": 4e8, "tflop_per_s": 9e-1 / seconds,
            "gb_per_s": 4e-1 / seconds, "tokens_per_s": f64::from(tokens) / seconds, "bound": "operations",
            "share": 9e11 / 7e14 / seconds
        })
    };
    json!({
        "mode": "full", "commit": "0123456789abcdef", "gpu": CARD, "date": "2026-11-22T10:00:00Z",
        "parts": [
            {"part": "tests-train", "result": "ok", "seconds": 20, "note": ""},
            {"part": "train-paper", "result": "ok", "seconds": 130, "note": ""}
        ],
        "trainings": [{"part": "train-paper", "summary": {"success_rate": 0.995}}],
        "bench": {
            "version": "0.1.0", "threads": 2,
            "ceilings": [
                [CARD, {"bytes_per_s": 2.5e12, "operations_per_s": 7e14}],
                ["cpu", {"bytes_per_s": 2e10, "operations_per_s": 1e11}]
            ],
            "rows": [
                row("step", CARD, 4e-3), row("step_hopper", CARD, 3e-3), row("step", "cpu", 9.0),
                {"operation": "adamw", "scale": "paper", "tokens": tokens, "device": "cpu", "skipped": "no time left"}
            ]
        },
        "peers": [{
            "operation": "step", "scale": "paper", "peer": "eager", "precision": "float32", "device": CARD,
            "torch": "2.13.0", "tokens": tokens, "seconds": times * 3e-3,
            "tokens_per_s": f64::from(tokens) / (times * 3e-3)
        }]
    })
}

fn repository() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("docs")).unwrap();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    fs::copy(page, folder.path().join("docs/performance.md")).unwrap();
    folder
}

/// Nothing where there is no Python.
fn record(summary: &Value, repository: &Path) -> Option<Output> {
    let file = repository.join("summary.json");
    fs::write(&file, summary.to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench-report");
    let mut command = Command::new("python3");
    let output = command
        .arg(script)
        .arg(file)
        .arg("--record")
        .arg(repository);
    match output.output() {
        Ok(output) => Some(output),
        Err(reason) => {
            eprintln!("SKIPPED: a check of a script: python3: {reason}");
            None
        }
    }
}

#[test]
fn what_a_gpu_measured_is_kept_and_set_beside_the_goals() {
    let repository = repository();
    let page = repository.path().join("docs/performance.md");
    let text = || fs::read_to_string(&page).unwrap();
    let before = text();
    for (times, verdict) in [(9.0, "9 | not reached"), (12.0, "12 | reached")] {
        let Some(output) = record(&summary(times), repository.path()) else {
            return;
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let kept = "benches/results/nvidia-h100-80gb-hbm3-2026-11-22.json";
        let kept: Value =
            serde_json::from_slice(&fs::read(repository.path().join(kept)).unwrap()).unwrap();
        assert_eq!(kept, summary(times));
        let text = text();
        for part in [
            &format!("eager float32 step | 10 | {verdict} |"),
            "compiled bfloat16 step | 3 | not measured | |",
            "measured bf16 rate | 40.0% | 42.9% | reached |",
            "unseen episodes | 0.99 | 0.995 | reached |",
            "at most 120 s | 130 s | not reached |",
            "in each precision | the CPU's | the CPU's | reached |",
            "| step | paper | 8448 | bf16 | 4 ms |",
            "| step | paper | 4 ms | 3 ms | 1.33 |",
        ] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
        assert!(!text.contains("9e+03 ms"), "the CPU's times: {text}");
        // All else is as it was.
        let [first, last] = ["# Performance", "## Versions for Hopper"];
        let around = |text: &str| {
            let (_, rest) = text.split_once(last).unwrap();
            (
                text.split_once("<!--").unwrap().0.to_owned(),
                rest.to_owned(),
            )
        };
        assert!(text.starts_with(first) && around(&text) == around(&before));
    }
}

#[test]
fn what_was_not_measured_on_a_gpu_is_not_kept() {
    let repository = repository();
    let mut without = summary(1.0);
    without["gpu"] = json!("");
    let Some(output) = record(&without, repository.path()) else {
        return;
    };
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("ran on a GPU"));
    assert!(!repository.path().join("benches").exists());
}
