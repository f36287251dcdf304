//! The two pictures of a run, and what other pictures are drawn with.

use std::path::Path;
use std::sync::OnceLock;

use ndarray::{Array2, ArrayView2};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::Error;
use super::evaluate::{TaskResult, Validation};
use super::metrics::Line;
use super::run::Evaluated;
use crate::batch::PackedBatch;
use crate::tasks::write_beside;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(40, 44, 52);
pub(crate) const GRID: RGBColor = RGBColor(226, 229, 234);
pub(crate) const BLUE: RGBColor = RGBColor(31, 105, 193);
pub(crate) const ORANGE: RGBColor = RGBColor(222, 113, 22);
pub(crate) const GREEN: RGBColor = RGBColor(34, 139, 84);
pub(crate) const PURPLE: RGBColor = RGBColor(124, 77, 170);
const RED: RGBColor = RGBColor(191, 54, 54);
pub(crate) const GREY: RGBColor = RGBColor(130, 136, 145);

pub(crate) type Drawing<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
/// Whatever plotters reports; only its text is used.
pub(crate) type Drawn = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Draws losses, accuracy and learning rate against real tokens, with the success rates at the end
/// and those of evaluations on the way.
pub fn curves(
    path: &Path,
    title: &str,
    lines: &[Line],
    evaluated: &[Evaluated],
    results: &[TaskResult],
) -> Result<(), Error> {
    picture(path, (1280, 960), |area| {
        draw_curves(area, title, lines, evaluated, results)
    })
}

/// What a picture of a map is called.
#[derive(Debug, Clone, Copy)]
pub struct MapCaptions<'a> {
    /// Over all.
    pub title: &'a str,
    /// Over the map.
    pub map: &'a str,
    /// What a column is, and a row.
    pub axes: [&'a str; 2],
}

/// Draws a `map` [T, T] of the first sequence of a batch beside the `target` [T, T] that it was
/// taught. Axes count time steps, of `tokens_per_step` tokens each.
pub fn map(
    path: &Path,
    captions: MapCaptions,
    [map, target]: [ArrayView2<f64>; 2],
    tokens_per_step: usize,
) -> Result<(), Error> {
    picture(path, (1360, 760), |area| {
        draw_map(area, captions, [map, target], tokens_per_step)
    })
}

/// What the pairs of the first sequence of `batch` ask for: each row with k pairs has 1/k there.
/// `across`: only the pairs that a memory recalls, whose tokens stand in different segments.
pub fn target(batch: &PackedBatch, across: bool) -> Array2<f64> {
    let segments = batch.segments_of_first();
    let tokens = segments.last().copied().unwrap_or_default();
    let mut target = Array2::zeros((tokens, tokens));
    let offsets = batch.pair_offsets.windows(2);
    for ((query, mut row), offsets) in target.rows_mut().into_iter().enumerate().zip(offsets) {
        let segment = segments.iter().take_while(|&&start| start <= query).last();
        let keys = offsets[0] as usize..offsets[1] as usize;
        let keys = batch.pair_keys.get(keys).unwrap_or_default().iter();
        let keys = keys.map(|&key| key as usize);
        let keys = keys.filter(|key| !across || Some(key) < segment);
        let share = 1.0 / keys.clone().count() as f64;
        for key in keys {
            row[key] = share;
        }
    }
    target
}

/// Colours of the tasks' results, again from the first where there are more tasks.
const OF_TASKS: [RGBColor; 4] = [GREEN, ORANGE, PURPLE, RED];

fn draw_curves(
    area: &Drawing,
    title: &str,
    lines: &[Line],
    evaluated: &[Evaluated],
    results: &[TaskResult],
) -> Drawn {
    let area = area.margin(10, 0, 10, 0).titled(title, text(28))?;
    let most_tokens = lines.last().map_or(1.0, |line| line.tokens as f64).max(1.0);
    // A little room at the right for the success rate.
    let tokens = 0.0..most_tokens * 1.04;
    let (losses, rest) = area.split_vertically(430);
    let (shares, rates) = rest.split_vertically(300);

    let series = |value: fn(&Line) -> f64| lines.iter().map(move |l| (l.tokens as f64, value(l)));
    let losses_drawn = [
        (
            "action loss (nats per action)",
            BLUE,
            series(|line| line.action_loss),
        ),
        (
            "memory loss (attention-BCE)",
            ORANGE,
            series(|line| line.memory_loss),
        ),
    ];
    let drawn = |value: f64| value > 0.0 && value.is_finite();
    let unseen = evaluated.iter().flat_map(|line| &line.validation);
    let values: Vec<f64> = lines
        .iter()
        .flat_map(|line| [line.action_loss, line.memory_loss])
        .chain(unseen.map(|validation| validation.loss))
        .filter(|value| drawn(*value))
        .collect();
    let least = values.iter().copied().fold(1.0, f64::min);
    let most = values.iter().copied().fold(least * 10.0, f64::max);
    let mut chart = ChartBuilder::on(&losses)
        .margin_right(24)
        .x_label_area_size(24)
        .margin_left(10)
        .y_label_area_size(84)
        .build_cartesian_2d(tokens.clone(), (least * 0.8..most * 1.25).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style(text(16))
        .y_desc("loss, log scale")
        .y_label_formatter(&|value| significant(*value))
        .x_label_formatter(&|_| String::new())
        .draw()?;
    for (name, colour, points) in losses_drawn {
        let points: Vec<_> = points.filter(|(_, value)| drawn(*value)).collect();
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |at| swatch(at, colour));
    }
    let tasks = evaluated.first().map_or(&[][..], |line| &line.validation);
    for (index, Validation { label, .. }) in tasks.iter().enumerate() {
        let colour = OF_TASKS[index % OF_TASKS.len()];
        let points = evaluated.iter().filter_map(|line| {
            let of_task = line.validation.iter().find(|one| one.label == *label)?;
            drawn(of_task.loss).then_some((line.tokens as f64, of_task.loss))
        });
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
            .label(format!("{label}: loss on unseen demonstrations"))
            .legend(move |at| swatch(at, colour));
    }
    legend(&mut chart)?;

    let mut chart = ChartBuilder::on(&shares)
        .margin_right(24)
        .x_label_area_size(24)
        .margin_left(10)
        .y_label_area_size(84)
        .build_cartesian_2d(tokens.clone(), 0.0..1.05)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style(text(16))
        .y_desc("share")
        .y_labels(6)
        .x_label_formatter(&|_| String::new())
        .draw()?;
    chart
        .draw_series(LineSeries::new(
            series(|line| line.accuracy),
            BLUE.stroke_width(2),
        ))?
        .label("actions predicted right (training)")
        .legend(|at| swatch(at, BLUE));
    for (index, result) in results.iter().enumerate() {
        let colour = OF_TASKS[index % OF_TASKS.len()];
        let (of_task, without) = match results.len() {
            1 => (String::new(), GREY),
            _ => (format!("{}: ", result.label), colour),
        };
        let chance = result.task.chance();
        let whole = [(0.0, chance), (most_tokens * 1.04, chance)];
        chart
            .draw_series([DashedPathElement::new(whole, 8, 6, without.stroke_width(2))])?
            .label(format!(
                "{of_task}success without memory, about {chance:.2}"
            ))
            .legend(move |at| swatch(at, without));
        let on_the_way = evaluated.iter().filter_map(|line| {
            let task = line.tasks.iter().find(|task| task.label == result.label)?;
            Some((line.tokens as f64, task.success_rate))
        });
        chart.draw_series(LineSeries::new(on_the_way, colour.stroke_width(2)).point_size(3))?;
        let rate = result.evaluation.success_rate();
        let [low, high] = result.evaluation.interval();
        // Side by side in the room at the right.
        let place = (index + 1) as f64 / (results.len() + 1) as f64;
        let at = most_tokens * (1.0 + 0.04 * place);
        let interval = [(at, low), (at, high)];
        chart
            .draw_series([PathElement::new(interval, colour.stroke_width(3))])?
            .label(format!(
                "{of_task}success on unseen episodes, {rate:.3} ({low:.3} to {high:.3})"
            ))
            .legend(move |at| swatch(at, colour));
        chart.draw_series([Circle::new((at, rate), 6, colour.filled())])?;
    }
    legend(&mut chart)?;

    let most = lines
        .iter()
        .map(|line| line.learning_rate)
        .fold(0.0, f64::max);
    let most = if most > 0.0 { most } else { 1.0 };
    let mut chart = ChartBuilder::on(&rates)
        .margin_right(24)
        .margin_bottom(12)
        .x_label_area_size(52)
        .margin_left(10)
        .y_label_area_size(84)
        .build_cartesian_2d(tokens, 0.0..most * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style(text(16))
        .x_desc("real tokens")
        .y_desc("learning rate")
        .y_labels(3)
        .x_label_formatter(&|value| amount(*value))
        .y_label_formatter(&|value| significant(*value))
        .draw()?;
    chart.draw_series(LineSeries::new(
        series(|line| line.learning_rate),
        GREY.stroke_width(2),
    ))?;
    Ok(())
}

pub(crate) fn legend<'a, 'b, X: Ranged, Y: Ranged>(
    chart: &mut ChartContext<'a, BitMapBackend<'b>, Cartesian2d<X, Y>>,
) -> Drawn
where
    'b: 'a,
    X::ValueType: 'static,
    Y::ValueType: 'static,
{
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
        .label_font(text(16))
        .position(SeriesLabelPosition::MiddleRight)
        .draw()
        .map_err(|error| error.to_string().into())
}

pub(crate) fn swatch((x, y): (i32, i32), colour: RGBColor) -> Rectangle<(i32, i32)> {
    Rectangle::new([(x, y - 2), (x + 18, y + 2)], colour.filled())
}

fn draw_map(
    area: &Drawing,
    captions: MapCaptions,
    [map, target]: [ArrayView2<f64>; 2],
    tokens_per_step: usize,
) -> Drawn {
    let area = area.margin(10, 0, 0, 0).titled(captions.title, text(28))?;
    let (maps, scale) = area.split_horizontally(1260);
    let halves = maps.split_evenly((1, 2));
    let panels = [
        (captions.map, map),
        ("annotated pairs, each row shared out", target),
    ];
    for (half, (caption, map)) in halves.iter().zip(panels) {
        let per_step = tokens_per_step as f64;
        let steps = map.nrows() as f64 / per_step;
        let mut chart = ChartBuilder::on(half)
            .caption(caption, text(20))
            .margin_left(8)
            .margin_right(16)
            .x_label_area_size(52)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..steps, steps..0.0)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(GREY)
            .label_style(text(16))
            .x_desc(format!("{} token, by time step", captions.axes[0]))
            .y_desc(format!("{} token, by time step", captions.axes[1]))
            .x_label_formatter(&|value| amount(*value))
            .y_label_formatter(&|value| amount(*value))
            .draw()?;
        let cells = map.indexed_iter().map(|((row, column), value)| {
            let colour = if column > row { WHITE } else { heat(*value) };
            let at = |index: usize| index as f64 / per_step;
            Rectangle::new(
                [(at(column), at(row)), (at(column + 1), at(row + 1))],
                colour.filled(),
            )
        });
        chart.draw_series(cells)?;
    }
    draw_scale(&scale)
}

/// The colours of 0 to 1, with their values.
fn draw_scale(area: &Drawing) -> Drawn {
    const TOP: i32 = 60;
    const HEIGHT: i32 = 560;
    for row in 0..HEIGHT {
        let value = 1.0 - f64::from(row) / f64::from(HEIGHT - 1);
        area.draw(&Rectangle::new(
            [(8, TOP + row), (32, TOP + row + 1)],
            heat(value).filled(),
        ))?;
    }
    for tick in 0..=4 {
        let value = f64::from(tick) / 4.0;
        let y = TOP + HEIGHT - HEIGHT * tick / 4;
        let style = text(16).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(format!("{value:.2}"), (40, y), style))?;
    }
    Ok(())
}

/// From pale to dark, even to the eye: 0 is nearly white.
fn heat(value: f64) -> RGBColor {
    const STOPS: [[f64; 3]; 5] = [
        [243.0, 246.0, 250.0],
        [164.0, 203.0, 226.0],
        [66.0, 146.0, 188.0],
        [24.0, 85.0, 140.0],
        [10.0, 29.0, 69.0],
    ];
    let value = if value.is_finite() {
        value.clamp(0.0, 1.0)
    } else {
        0.0
    };
    let place = value * (STOPS.len() - 1) as f64;
    let low = (place as usize).min(STOPS.len() - 2);
    let share = place - low as f64;
    let mix = |channel: usize| {
        let (a, b) = (STOPS[low][channel], STOPS[low + 1][channel]);
        (a + (b - a) * share).round() as u8
    };
    RGBColor(mix(0), mix(1), mix(2))
}

pub(crate) fn text(size: u32) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font()).color(&INK)
}

/// A number as an axis shows it: two significant digits, no trailing zeros.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if (0.01..1000.0).contains(&value.abs()) {
        let digits = (1.0 - value.abs().log10().floor()).max(0.0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') {
            return text.trim_end_matches('0').trim_end_matches('.').to_owned();
        }
        return text;
    }
    let text = format!("{value:.1e}");
    text.replace(".0e", "e")
}

/// A count as an axis shows it: 12, 40 k, 2.5 M.
fn amount(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e9 => (value / 1e9, " G"),
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e3 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    format!("{}{unit}", (value * 100.0).round() / 100.0)
}

/// Draws into memory, encodes as PNG and writes the file beside the old one.
pub(crate) fn picture(
    path: &Path,
    size: (u32, u32),
    draw: impl FnOnce(&Drawing) -> Drawn,
) -> Result<(), Error> {
    let fail = |message: String| Error::Picture {
        path: path.to_owned(),
        message,
    };
    register()?;
    let mut pixels = vec![0; size.0 as usize * size.1 as usize * 3];
    let drawn = (|| -> Drawn {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        area.present()?;
        Ok(())
    })();
    drawn.map_err(|error| fail(error.to_string()))?;
    let bytes = encode(&pixels, size).map_err(|error| fail(error.to_string()))?;
    write_beside(path, &bytes).map_err(Error::io("write it", path))
}

fn encode(pixels: &[u8], size: (u32, u32)) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, size.0, size.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// Makes the built-in font known, once; no font of the system is needed.
fn register() -> Result<(), Error> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = *REGISTERED.get_or_init(|| {
        register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR).is_ok()
    });
    if registered {
        Ok(())
    } else {
        Err(Error::Picture {
            path: "the built-in font".into(),
            message: "it cannot be read".to_owned(),
        })
    }
}
