//! The convolutional front end: 3×3, padding 1, stride 1, on grids.
//!
//! Feature maps are [channels, positions] per sample (channel-major), position = vx·height + vy,
//! so flattening is free.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{
    ArrayBase, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Ix1, Ix2, RawData, Slice,
};

use crate::error::check_shape;
use crate::{Error, Result, Scalar, linear};

/// Extent of a kernel along each axis.
const SIDE: usize = 3;

/// Weights of a kernel per channel: tap kx·3 + ky.
const TAPS: usize = SIDE * SIDE;

/// A grid of one-hot cells: `width`×`height` positions, `cardinalities.len()` fields per cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Extent of the first axis (vx).
    pub width: usize,
    /// Extent of the second axis (vy).
    pub height: usize,
    /// Number of values of each field of a cell, e.g. [11, 6, 3].
    pub cardinalities: Vec<usize>,
}

/// How one tap of a kernel sees a feature map laid out by position: output positions `target` read
/// input positions `source`, except where vy = `border`, whose neighbour is outside of the grid.
struct Tap {
    target: Range<usize>,
    source: Range<usize>,
    border: Option<usize>,
}

// Sizes saturate: a product that overflows fits no array, so the shape checks refuse it.
impl Grid {
    /// One-hot channels: the sum of the cardinalities.
    pub fn channels(&self) -> usize {
        self.cardinalities
            .iter()
            .fold(0, |sum, &cardinality| sum.saturating_add(cardinality))
    }

    /// width · height.
    pub fn positions(&self) -> usize {
        self.width.saturating_mul(self.height)
    }

    /// First channel of each field.
    fn starts(&self) -> impl Iterator<Item = usize> {
        self.cardinalities
            .iter()
            .scan(0_usize, |next, &cardinality| {
                let start = *next;
                *next = next.saturating_add(cardinality);
                Some(start)
            })
    }

    /// The taps through which the input at `position` reaches an output, with that output's
    /// position: (vx + 1 − kx, vy + 1 − ky).
    fn reached(&self, position: usize) -> impl Iterator<Item = (usize, usize)> {
        let (vx, vy) = (position / self.height, position % self.height);
        (0..TAPS).filter_map(move |tap| {
            let x = (vx + 1)
                .checked_sub(tap / SIDE)
                .filter(|&x| x < self.width)?;
            let y = (vy + 1)
                .checked_sub(tap % SIDE)
                .filter(|&y| y < self.height)?;
            Some((tap, x * self.height + y))
        })
    }

    /// All taps, in order. A neighbour stands at a fixed distance in memory, so that whole maps are
    /// moved at once.
    fn taps(&self) -> impl Iterator<Item = Tap> {
        let positions = self.positions();
        let centre = self.height + 1;
        (0..TAPS).map(move |tap| {
            let (kx, ky) = (tap / SIDE, tap % SIDE);
            let distance = kx * self.height + ky;
            let back = centre.saturating_sub(distance).min(positions);
            let ahead = distance.saturating_sub(centre).min(positions);
            Tap {
                target: back..positions - ahead,
                source: ahead..positions - back,
                border: [Some(0), None, self.height.checked_sub(1)][ky],
            }
        })
    }

    /// Sets what a tap must not see to zero.
    fn clear<T: Scalar>(&self, border: Option<usize>, column: &mut [T]) {
        let Some(first) = border else { return };
        for value in column.iter_mut().skip(first).step_by(self.height) {
            *value = T::zero();
        }
    }

    /// `columns` [in·9, positions]: for every output position the inputs that its kernel covers.
    fn unfold<T: Scalar>(&self, x: &[T], columns: &mut [T]) {
        let positions = self.positions();
        let maps = x.chunks_exact(positions);
        for (map, columns) in maps.zip(columns.chunks_exact_mut(TAPS * positions)) {
            for (tap, column) in self.taps().zip(columns.chunks_exact_mut(positions)) {
                column[..tap.target.start].fill(T::zero());
                column[tap.target.end..].fill(T::zero());
                column[tap.target].copy_from_slice(&map[tap.source]);
                self.clear(tap.border, column);
            }
        }
    }

    /// The transpose of [`Grid::unfold`]: x = Σ of what `columns` took from it. Changes `columns`.
    fn fold<T: Scalar>(&self, columns: &mut [T], x: &mut [T]) {
        let positions = self.positions();
        x.fill(T::zero());
        let maps = x.chunks_exact_mut(positions);
        for (map, columns) in maps.zip(columns.chunks_exact_mut(TAPS * positions)) {
            for (tap, column) in self.taps().zip(columns.chunks_exact_mut(positions)) {
                self.clear(tap.border, column);
                for (x, &column) in map[tap.source].iter_mut().zip(&column[tap.target]) {
                    *x += column;
                }
            }
        }
    }

    /// Checks the arguments of the one-hot convolution; every code must be a value of its field.
    fn check_one_hot(&self, codes: ArrayView2<u8>, weight: &[usize], out: usize) -> Result<()> {
        let fields = self.cardinalities.len();
        let inputs = self.positions().saturating_mul(fields);
        check_shape("codes", codes.shape(), &[codes.nrows(), inputs])?;
        check_shape(
            "weight",
            weight,
            &[self.channels().saturating_mul(TAPS), out],
        )?;
        for (row, codes) in codes.rows().into_iter().enumerate() {
            for (input, (&code, &cardinality)) in codes
                .iter()
                .zip(self.cardinalities.iter().cycle())
                .enumerate()
            {
                if usize::from(code) >= cardinality {
                    let (position, field) = (input / fields, input % fields);
                    return Err(Error::value(
                        "codes",
                        format!("{code} at row {row}, position {position}, field {field}"),
                        format!("less than {cardinality}"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` with the rows of a weight [channels·9, out] that belong to each field's code
    /// of the cell at `position`.
    fn for_each_kernel(
        &self,
        codes: ArrayView1<u8>,
        position: usize,
        mut visit: impl FnMut(Slice),
    ) {
        let first = position * self.cardinalities.len();
        for (field, start) in self.starts().enumerate() {
            let channel = start + usize::from(codes[first + field]);
            visit(Slice::from(channel * TAPS..(channel + 1) * TAPS));
        }
    }
}

/// First convolution on one-hot cells: a sum of weight rows.
///
/// `codes` [rows, positions·fields] as in an observation (\[vx\]\[vy\]\[field\]); `weight`
/// [channels·9, out], input-major: row (channel·3 + kx)·3 + ky; `bias` \[out\]; `y`
/// [rows, out·positions]. `scratch` grows to (positions + 9)·out.
pub fn one_hot_forward<T: Scalar>(
    grid: &Grid,
    codes: ArrayView2<u8>,
    weight: ArrayView2<T>,
    bias: ArrayView1<T>,
    mut y: ArrayViewMut2<T>,
    scratch: &mut Vec<T>,
) -> Result<()> {
    let (positions, out) = (grid.positions(), weight.ncols());
    grid.check_one_hot(codes, weight.shape(), out)?;
    check_shape("bias", bias.shape(), &[out])?;
    check_shape(
        "y",
        y.shape(),
        &[codes.nrows(), out.saturating_mul(positions)],
    )?;
    for (codes, y) in codes.rows().into_iter().zip(y.rows_mut()) {
        // Position by position, so that every sum runs over whole weight rows.
        let (mut sums, mut kernel) = position_major(scratch, positions, out)?;
        for mut sum in sums.rows_mut() {
            sum.assign(&bias);
        }
        for position in 0..positions {
            kernel.fill(T::zero());
            grid.for_each_kernel(codes, position, |rows| {
                kernel += &weight.slice_axis(Axis(0), rows);
            });
            for (tap, reached) in grid.reached(position) {
                let mut sum = sums.row_mut(reached);
                sum += &kernel.row(tap);
            }
        }
        for (y, &sum) in y.into_iter().zip(sums.t()) {
            *y = sum;
        }
    }
    Ok(())
}

/// Gradients of [`one_hot_forward`]: dweight and dbias are added to. Shapes as there.
pub fn one_hot_backward<T: Scalar>(
    grid: &Grid,
    codes: ArrayView2<u8>,
    dy: ArrayView2<T>,
    mut dweight: ArrayViewMut2<T>,
    mut dbias: ArrayViewMut1<T>,
    scratch: &mut Vec<T>,
) -> Result<()> {
    let (positions, out) = (grid.positions(), dweight.ncols());
    grid.check_one_hot(codes, dweight.shape(), out)?;
    check_shape("dbias", dbias.shape(), &[out])?;
    check_shape(
        "dy",
        dy.shape(),
        &[codes.nrows(), out.saturating_mul(positions)],
    )?;
    for (codes, dy) in codes.rows().into_iter().zip(dy.rows()) {
        let (mut dsums, mut kernel) = position_major(scratch, positions, out)?;
        for (dsum, &dy) in dsums.view_mut().reversed_axes().into_iter().zip(dy) {
            *dsum = dy;
        }
        linear::backward_bias(dsums.view(), dbias.view_mut())?;
        for position in 0..positions {
            kernel.fill(T::zero());
            for (tap, reached) in grid.reached(position) {
                kernel.row_mut(tap).assign(&dsums.row(reached));
            }
            grid.for_each_kernel(codes, position, |rows| {
                let mut dweight = dweight.slice_axis_mut(Axis(0), rows);
                dweight += &kernel;
            });
        }
    }
    Ok(())
}

/// Second convolution. `x` [rows, in·positions]; `weight` [out, in·9] with column
/// (channel·3 + kx)·3 + ky (PyTorch's order for an [out, in, 3, 3] weight); `bias` \[out\]; `y`
/// [rows, out·positions]. Every row of `x` and `y` is contiguous. `scratch` grows to
/// in·9·positions. The grid's cardinalities are not used.
pub fn forward<T: Scalar>(
    grid: &Grid,
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    bias: ArrayView1<T>,
    mut y: ArrayViewMut2<T>,
    scratch: &mut Vec<T>,
) -> Result<()> {
    let (positions, out) = (grid.positions(), weight.nrows());
    let channels = check_maps(grid, x, weight)?;
    check_shape("bias", bias.shape(), &[out])?;
    check_shape("y", y.shape(), &[x.nrows(), out.saturating_mul(positions)])?;
    if positions == 0 {
        return Ok(());
    }
    for (x, y) in x.rows().into_iter().zip(y.rows_mut()) {
        let columns = grown(scratch, channels * TAPS * positions);
        grid.unfold(x.to_slice().ok_or_else(|| gaps("x"))?, columns);
        let columns = matrix("scratch", columns.into(), channels * TAPS, positions)?;
        let mut y = matrix("y", y, out, positions)?;
        for (mut y, &bias) in y.rows_mut().into_iter().zip(bias) {
            y.fill(bias);
        }
        general_mat_mul(T::one(), &weight, &columns, T::one(), &mut y);
    }
    Ok(())
}

/// Gradients of [`forward`]: dx is overwritten, dweight and dbias are added to. Shapes as there;
/// every row of `x`, `dy` and `dx` is contiguous.
pub fn backward<T: Scalar>(
    grid: &Grid,
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    dy: ArrayView2<T>,
    mut dx: ArrayViewMut2<T>,
    mut dweight: ArrayViewMut2<T>,
    mut dbias: ArrayViewMut1<T>,
    scratch: &mut Vec<T>,
) -> Result<()> {
    let (positions, out) = (grid.positions(), weight.nrows());
    let channels = check_maps(grid, x, weight)?;
    check_shape(
        "dy",
        dy.shape(),
        &[x.nrows(), out.saturating_mul(positions)],
    )?;
    check_shape("dx", dx.shape(), x.shape())?;
    check_shape("dweight", dweight.shape(), weight.shape())?;
    check_shape("dbias", dbias.shape(), &[out])?;
    if positions == 0 {
        return Ok(());
    }
    for ((x, dy), mut dx) in x.rows().into_iter().zip(dy.rows()).zip(dx.rows_mut()) {
        let dy = matrix("dy", dy, out, positions)?;
        for (dbias, dy) in dbias.iter_mut().zip(dy.rows()) {
            *dbias += dy.sum();
        }
        let x = x.to_slice().ok_or_else(|| gaps("x"))?;
        let dx = dx.as_slice_mut().ok_or_else(|| gaps("dx"))?;
        let scratch = grown(scratch, channels * TAPS * positions);
        grid.unfold(x, scratch);
        let mut columns = matrix("scratch", scratch.into(), channels * TAPS, positions)?;
        general_mat_mul(T::one(), &dy, &columns.t(), T::one(), &mut dweight);
        // The columns have served: their gradient takes their place.
        general_mat_mul(T::one(), &weight.t(), &dy, T::zero(), &mut columns);
        grid.fold(scratch, dx);
    }
    Ok(())
}

/// Checks feature maps against a weight [out, in·9]; the number of input channels.
fn check_maps<T>(grid: &Grid, x: ArrayView2<T>, weight: ArrayView2<T>) -> Result<usize> {
    let channels = weight.ncols() / TAPS;
    check_shape("weight", weight.shape(), &[weight.nrows(), channels * TAPS])?;
    let inputs = channels.saturating_mul(grid.positions());
    check_shape("x", x.shape(), &[x.nrows(), inputs])?;
    Ok(channels)
}

/// The first `len` elements of a vector that is made long enough.
fn grown<T: Scalar>(scratch: &mut Vec<T>, len: usize) -> &mut [T] {
    if scratch.len() < len {
        scratch.resize(len, T::zero());
    }
    &mut scratch[..len]
}

/// Two matrices in one vector: [positions, out] and [9, out].
fn position_major<T: Scalar>(
    scratch: &mut Vec<T>,
    positions: usize,
    out: usize,
) -> Result<(ArrayViewMut2<'_, T>, ArrayViewMut2<'_, T>)> {
    let rows = positions.saturating_add(TAPS);
    let both = grown(scratch, rows.saturating_mul(out));
    let both = matrix("scratch", both.into(), rows, out)?;
    Ok(both.split_at(Axis(0), positions))
}

/// A contiguous row as a matrix.
fn matrix<S: RawData>(
    argument: &'static str,
    row: ArrayBase<S, Ix1>,
    rows: usize,
    columns: usize,
) -> Result<ArrayBase<S, Ix2>> {
    let matrix = row.into_shape_with_order([rows, columns]);
    matrix.map_err(|_| gaps(argument))
}

/// The error for a row whose elements do not follow each other in memory.
fn gaps(argument: &'static str) -> Error {
    Error::value(argument, "not contiguous", "contiguous rows")
}
