//! `results.csv`, `results.md` and `results.png`. The same results give the same bytes.

use std::fmt::Write as _;
use std::path::Path;

use super::grid::{Cell, Grid, Kind, Measure};
use super::run::{CellResult, Results, io};
use super::statistics::Mean;
use super::{Size, plot};
use crate::tasks::write_beside;
use crate::train;

/// Writes all three, each beside the old one.
pub(super) fn write(
    out: &Path,
    name: &str,
    size: Size,
    set: &[String],
    grid: &Grid,
    results: &Results,
) -> Result<(), train::Error> {
    std::fs::create_dir_all(out).map_err(io("create this folder", out))?;
    let text = |file: &str, contents: &str| {
        let path = out.join(file);
        write_beside(&path, contents.as_bytes()).map_err(io("write it", &path))
    };
    text("results.csv", &csv(grid, results))?;
    text("results.md", &markdown(name, size, set, grid, results))?;
    plot::write(&out.join("results.png"), name, grid, results)
}

/// The values of a measure in the seeds of a cell that have one.
pub(super) fn values(measure: &Measure, cell: usize, results: &Results) -> Vec<f64> {
    let seeds = (0..results.seeds).filter_map(|seed| results.get(cell, seed));
    seeds
        .filter_map(|result| result.values.get(measure.key).copied())
        .collect()
}

/// Mean and interval of a measure over the seeds of a cell.
pub(super) fn mean(measure: &Measure, cell: usize, results: &Results) -> Option<Mean> {
    let mean = Mean::of(&values(measure, cell, results))?;
    Some(match measure.kind {
        Kind::Share => mean.within(0.0, 1.0),
        Kind::Count => mean,
    })
}

/// The level without memory of a cell.
pub(super) fn without_memory(cell: usize, results: &Results) -> Option<f64> {
    (0..results.seeds).find_map(|seed| results.get(cell, seed)?.without_memory)
}

/// One result in words.
pub(super) fn line(grid: &Grid, result: &CellResult) -> String {
    if let Some(failure) = &result.failure {
        return failure.clone();
    }
    let shares = grid.measures.iter().filter(|one| one.kind == Kind::Share);
    let shares = shares.filter_map(|measure| {
        let value = result.values.get(measure.key)?;
        Some(format!("{} {value:.3}", measure.title))
    });
    let seconds = format!("in {:.0} s", result.seconds);
    shares.chain([seconds]).collect::<Vec<_>>().join(", ")
}

/// One row per cell and seed that is done.
fn csv(grid: &Grid, results: &Results) -> String {
    let mut text = "group,cell,seed".to_owned();
    for measure in grid.measures {
        text = text + "," + measure.key;
    }
    text += ",without_memory,failure,settings\n";
    let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    for (index, cell) in grid.cells.iter().enumerate() {
        let seeds = (0..results.seeds).filter_map(|seed| Some((seed, results.get(index, seed)?)));
        for (seed, result) in seeds {
            let mut fields = vec![quoted(cell.group), quoted(&cell.name), seed.to_string()];
            let values = grid.measures.iter().map(|one| result.values.get(one.key));
            fields.extend(values.map(|value| number(value.copied())));
            fields.push(number(result.without_memory));
            fields.push(quoted(result.failure.as_deref().unwrap_or_default()));
            fields.push(quoted(&settings(cell)));
            text = text + &fields.join(",") + "\n";
        }
    }
    text
}

/// What `dtmem train` would be given.
fn settings(cell: &Cell) -> String {
    let base = [cell.base.name().to_owned()];
    let set = cell.set.iter().map(|one| format!("--set {one}"));
    base.into_iter().chain(set).collect::<Vec<_>>().join(" ")
}

/// A field of a CSV file (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// One table per group.
fn markdown(name: &str, size: Size, set: &[String], grid: &Grid, results: &Results) -> String {
    let seeds = results.seeds;
    let set: String = set.iter().map(|one| format!(" --set '{one}'")).collect();
    let mut text = format!(
        "# {name} ({size})\n\n`dtmem experiment {name} --{size} --seeds {seeds}{set}`: means over the \
         seeds of a cell, with 95 % intervals (Student's t), cut off at 0 and 1.\n",
        size = size.name()
    );
    for group in grid.groups() {
        let titles = grid.measures.iter().map(|measure| measure.title);
        let titles: Vec<&str> = titles.collect();
        let rule = "---|".repeat(titles.len() + 3);
        let row = |text: &mut String, fields: &[String]| {
            *text = format!("{text}| {} |\n", fields.join(" | ").replace('\n', " "));
        };
        text += "\n";
        let head = [group]
            .into_iter()
            .chain(titles)
            .chain(["without memory", "seeds"]);
        row(&mut text, &head.map(escaped).collect::<Vec<_>>());
        text = text + "|" + &rule + "\n";
        let cells = grid.cells.iter().enumerate();
        for (index, cell) in cells.filter(|(_, cell)| cell.group == group) {
            let mut fields = vec![escaped(&cell.name)];
            let measures = grid.measures.iter();
            fields.extend(measures.map(|measure| shown(measure, mean(measure, index, results))));
            let without = without_memory(index, results);
            fields.push(without.map_or("–".to_owned(), |value| format!("{value:.3}")));
            fields.push(counted(index, results));
            row(&mut text, &fields);
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

fn shown(measure: &Measure, mean: Option<Mean>) -> String {
    match (measure.kind, mean) {
        (_, None) => "–".to_owned(),
        (Kind::Count, Some(mean)) => format!("{:.0}", mean.mean),
        (Kind::Share, Some(Mean { mean, interval })) => match interval {
            None => format!("{mean:.3}"),
            Some([low, high]) => format!("{mean:.3} ({low:.3} to {high:.3})"),
        },
    }
}

/// How many seeds the numbers are of.
fn counted(cell: usize, results: &Results) -> String {
    let done = (0..results.seeds).filter_map(|seed| results.get(cell, seed));
    let (done, failed) = done.fold((0, 0), |(done, failed), result| {
        (done + 1, failed + u64::from(result.failure.is_some()))
    });
    let mut text = match done == results.seeds {
        true => done.to_string(),
        false => format!("{done} of {}", results.seeds),
    };
    if failed > 0 {
        // Writing to a string does not fail.
        let _ = write!(text, ", {failed} not finite");
    }
    text
}
