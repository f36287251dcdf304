//! The picture of a grid: a row per cell, with the mean over the seeds, its interval, and each seed.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::grid::{Grid, Kind, Measure};
use super::report;
use super::run::Results;
use crate::train;
use crate::train::plots::{
    BLUE, Drawing, Drawn, GREEN, GREY, GRID, ORANGE, PURPLE, legend, picture, swatch, text,
};

/// Colours of the measures, again from the first where there are more.
const COLOURS: [RGBColor; 4] = [BLUE, ORANGE, GREEN, PURPLE];
/// Sizes in pixels.
const WIDTH: u32 = 1280;
const ROW: u32 = 26;
const LABELS: u32 = 430;
const ABOVE: u32 = 50;
const BELOW: u32 = 60;
/// End of the axis of shares: the legend stands beyond 1.
const END: f64 = 1.35;

/// A line of the picture.
enum Row {
    Group(&'static str),
    Cell(usize),
}

/// Draws the shares among the measures.
pub(super) fn write(
    path: &Path,
    title: &str,
    grid: &Grid,
    results: &Results,
) -> Result<(), train::Error> {
    let mut rows = Vec::new();
    for group in grid.groups() {
        rows.push(Row::Group(group));
        let cells = grid.cells.iter().enumerate();
        let own = cells.filter(|(_, cell)| cell.group == group);
        rows.extend(own.map(|(index, _)| Row::Cell(index)));
    }
    let height = ABOVE + BELOW + ROW * rows.len().max(4) as u32;
    picture(path, (WIDTH, height), |area| {
        draw(area, title, &rows, grid, results)
    })
}

fn draw(area: &Drawing, title: &str, rows: &[Row], grid: &Grid, results: &Results) -> Drawn {
    let shares = grid.measures.iter().filter(|one| one.kind == Kind::Share);
    let shares: Vec<&Measure> = shares.collect();
    let lines = rows.len().max(4) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, text(28))
        .margin_right(24)
        .margin_bottom(8)
        .x_label_area_size(BELOW - 8)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(0.0..END, lines..0.0)?;
    let titles: Vec<&str> = shares.iter().map(|measure| measure.title).collect();
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .y_labels(0)
        .x_label_formatter(&|share| match *share {
            share if share < 1.05 => format!("{share:.1}"),
            _ => String::new(),
        })
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style(text(16))
        .x_desc(titles.join(", "))
        .draw()?;
    for (line, row) in rows.iter().enumerate() {
        let middle = line as f64 + 0.5;
        let (x, y) = chart.backend_coord(&(0.0, middle));
        let (label, at) = match row {
            Row::Group(group) => ((*group).to_owned(), (16, y)),
            Row::Cell(cell) => (grid.cells[*cell].name.clone(), (x - 12, y)),
        };
        let side = match row {
            Row::Group(_) => HPos::Left,
            Row::Cell(_) => HPos::Right,
        };
        let style = text(16).pos(Pos::new(side, VPos::Center));
        area.draw(&Text::new(label, at, style))?;
        if let Row::Cell(cell) = row {
            draw_cell(&mut chart, &shares, *cell, line as f64, results)?;
        }
    }
    for (index, measure) in shares.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
            .label(measure.title)
            .legend(move |at| swatch(at, colour));
    }
    let any = (0..grid.cells.len()).any(|cell| report::without_memory(cell, results).is_some());
    if any {
        chart
            .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
            .label("without memory, about")
            .legend(|at| swatch(at, GREY));
    }
    legend(&mut chart)
}

type Chart<'a, 'b> = ChartContext<
    'a,
    BitMapBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// The measures of a cell, one below the other in its row, which begins at `line`.
fn draw_cell(
    chart: &mut Chart,
    shares: &[&Measure],
    cell: usize,
    line: f64,
    results: &Results,
) -> Drawn {
    if let Some(level) = report::without_memory(cell, results) {
        let tick = [(level, line + 0.1), (level, line + 0.9)];
        chart.draw_series([PathElement::new(tick, GREY.stroke_width(2))])?;
    }
    for (index, measure) in shares.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let y = line + (index + 1) as f64 / (shares.len() + 1) as f64;
        let seeds = report::values(measure, cell, results);
        let seeds = seeds
            .into_iter()
            .map(|x| Circle::new((x, y), 3, colour.mix(0.4).filled()));
        chart.draw_series(seeds)?;
        let Some(mean) = report::mean(measure, cell, results) else {
            continue;
        };
        if let Some([low, high]) = mean.interval {
            let interval = [(low, y), (high, y)];
            chart.draw_series([PathElement::new(interval, colour.stroke_width(2))])?;
        }
        chart.draw_series([Circle::new((mean.mean, y), 5, colour.filled())])?;
    }
    Ok(())
}
