//! The host executor as a device: what a GPU would do, on the CPU, every access checked.

use std::ops::Range;

use dtmem_host::{Buffer, Executor, View};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ShapeBuilder};

use super::device::{Compute, Device, Element, Factor, Product, check_range};
use crate::ops::host::Host;
use crate::ops::{Error, Input, Launch, Launcher, Output, Result};

/// Kernels run by the executor, products of matrices by the CPU in f32.
#[derive(Debug, Default)]
pub struct HostDevice(Host);

impl HostDevice {
    /// A device whose threads take turns in the executor's order.
    pub fn new(executor: Executor) -> Self {
        Self(Host(executor))
    }

    fn executor(&self) -> &Executor {
        &self.0.0
    }

    /// The factor as a matrix of f32, not transposed any more.
    fn factor<T: Compute>(
        &self,
        factor: &Factor<'_, T>,
        rows: usize,
        columns: usize,
    ) -> Result<Array2<f32>> {
        let span = factor.elements.span();
        let view = View {
            address: span.address,
            bytes: span.bytes,
        };
        let numbers = self.executor().read::<T>(view).map_err(failed)?;
        let numbers: Vec<f32> = numbers.into_iter().map(Compute::widen).collect();
        let strides = match factor.transposed {
            false => (factor.stride, 1),
            true => (1, factor.stride),
        };
        let matrix = ArrayView2::from_shape((rows, columns).strides(strides), &numbers);
        Ok(matrix.map_err(failed)?.to_owned())
    }
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Launch {
        kernel: "a copy or product on the host",
        source: source.into(),
    }
}

impl Launcher for HostDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.launch(launch)
    }

    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        self.0.can_launch(launch)
    }
}

impl Device for HostDevice {
    type Memory<T: Element> = Buffer<T>;

    fn name(&self) -> &'static str {
        "host"
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Ok(self.executor().scratch(len))
    }

    fn len<T: Element>(&self, memory: &Buffer<T>) -> usize {
        memory.len()
    }

    fn upload<T: Element>(&self, from: &[T], to: &mut Buffer<T>, offset: usize) -> Result<()> {
        let range = offset..offset + from.len();
        check_range(&range, to.len())?;
        self.executor().write(to.slice(range), from).map_err(failed)
    }

    fn download<T: Element>(&self, from: &Buffer<T>, offset: usize, to: &mut [T]) -> Result<()> {
        let range = offset..offset + to.len();
        check_range(&range, from.len())?;
        let content = self.executor().read(from.slice(range)).map_err(failed)?;
        to.copy_from_slice(&content);
        Ok(())
    }

    fn zero<T: Element>(&self, memory: &mut Buffer<T>, range: Range<usize>) -> Result<()> {
        self.upload(&vec![T::default(); range.len()], memory, range.start)
    }

    fn copy<T: Element>(&self, from: &Buffer<T>, to: &mut Buffer<T>, len: usize) -> Result<()> {
        let mut content = vec![T::default(); len];
        self.download(from, 0, &mut content)?;
        self.upload(&content, to, 0)
    }

    fn input<'a, T: Element>(
        &'a self,
        memory: &'a Buffer<T>,
        range: Range<usize>,
    ) -> Result<Input<'a, T>> {
        check_range(&range, memory.len())?;
        Ok(Input::on_host(
            memory.slice(range.clone()).address,
            range.len(),
        ))
    }

    fn output<'a, T: Element>(
        &'a self,
        memory: &'a mut Buffer<T>,
        range: Range<usize>,
    ) -> Result<Output<'a, T>> {
        check_range(&range, memory.len())?;
        Ok(Output::on_host(
            memory.slice(range.clone()).address,
            range.len(),
        ))
    }

    fn multiply<T: Compute, U: Compute>(&self, product: Product<'_, T, U>) -> Result<()> {
        let Product {
            rows,
            columns,
            inner,
            ..
        } = product;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let a = self.factor(&product.a, rows, inner)?;
        let b = self.factor(&product.b, inner, columns)?;
        let mut c = Array2::zeros((rows, columns));
        general_mat_mul(1.0, &a, &b, 0.0, &mut c);
        if let Some(bias) = &product.bias {
            let view = view_of(bias.span().address, bias.len() * size_of::<U>());
            let bias = self.executor().read::<U>(view).map_err(failed)?;
            for mut row in c.rows_mut() {
                for (c, bias) in row.iter_mut().zip(&bias) {
                    *c += bias.widen();
                }
            }
        }
        for (index, row) in c.rows().into_iter().enumerate() {
            let address =
                product.c.span().address + (index * product.stride * size_of::<U>()) as u64;
            let view = view_of(address, columns * size_of::<U>());
            let before = match product.accumulate {
                true => self.executor().read::<U>(view).map_err(failed)?,
                false => vec![U::default(); columns],
            };
            let after: Vec<U> = before
                .iter()
                .zip(row)
                .map(|(before, &c)| U::narrow(before.widen() + c))
                .collect();
            self.executor().write(view, &after).map_err(failed)?;
        }
        Ok(())
    }
}

fn view_of(address: u64, bytes: usize) -> View {
    View { address, bytes }
}
