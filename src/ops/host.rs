//! Launches on the CPU, by the executor that checks every access and every barrier of a kernel.

pub use dtmem_host::{Buffer, Element, Executor, Order};

use dtmem_host::{Boxes, View};

use super::launch::{Arg, Launch, Launcher, TensorMap};
use super::memory::{Home, Input, Output, Span};
use super::{Error, Result};

/// The host executor. Memory is its buffers'.
///
/// ```
/// use dtmem::ops::{host::Host, layer_norm};
///
/// # fn main() -> dtmem::ops::Result<()> {
/// let host = Host::default();
/// let x = host.0.upload(&[1.0_f32, 2.0, 3.0, 5.0]);
/// let [weight, bias] = [host.0.upload(&[1.0_f32; 4]), host.0.upload(&[0.0_f32; 4])];
/// let [mut y, mut mean, mut rstd] = [4, 1, 1].map(|len| host.0.scratch::<f32>(len));
/// layer_norm::Shape { rows: 1, width: 4 }.forward(&host, layer_norm::Forward {
///     x: host.input(&x),
///     residual: None,
///     weight: host.input(&weight),
///     bias: host.input(&bias),
///     y: host.output(&mut y),
///     mean: host.output(&mut mean),
///     rstd: host.output(&mut rstd),
///     epsilon: 1e-5,
/// })?;
/// assert_eq!(mean.download(), [2.75]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Host(pub Executor);

impl Host {
    /// A buffer to read.
    pub fn input<'b, T: Element>(&self, buffer: &'b Buffer<T>) -> Input<'b, T> {
        Input::on_host(buffer.view().address, buffer.len())
    }

    /// A buffer to write.
    pub fn output<'b, T: Element>(&self, buffer: &'b mut Buffer<T>) -> Output<'b, T> {
        Output::on_host(buffer.view().address, buffer.len())
    }
}

/// A launch as the executor takes it, which does not hold on to its memory: the executor checks that.
#[derive(Debug)]
pub(crate) struct Prepared {
    kernel: &'static str,
    shape: dtmem_host::Launch,
    args: Vec<dtmem_host::Arg>,
}

impl Host {
    /// None where there is nothing to launch.
    pub(crate) fn prepare(launch: &Launch<'_>) -> Result<Option<Prepared>> {
        launch.check_home(Home::HOST)?;
        if launch.is_empty() {
            return Ok(None);
        }
        let view = |Span { address, bytes }| View { address, bytes };
        let arg = |arg: &Arg| {
            Ok(match *arg {
                Arg::Input(span) => dtmem_host::Arg::Input(view(span)),
                Arg::Output(span) => dtmem_host::Arg::Output(view(span)),
                Arg::Map(map) => dtmem_host::Arg::Map(encoded(map)?),
                Arg::I32(number) => dtmem_host::Arg::I32(number),
                Arg::U32(number) => dtmem_host::Arg::U32(number),
                Arg::I64(number) => dtmem_host::Arg::I64(number),
                Arg::U64(number) => dtmem_host::Arg::U64(number),
                Arg::F32(number) => dtmem_host::Arg::F32(number),
            })
        };
        let args: dtmem_host::Result<Vec<_>> = launch.args().iter().map(arg).collect();
        let args = args.map_err(|source| failed(launch.kernel(), source))?;
        let mut shape = dtmem_host::Launch::new(launch.grid(), launch.block());
        shape.shared_bytes = launch.shared_bytes();
        shape.cluster = launch.cluster();
        Ok(Some(Prepared {
            kernel: launch.kernel(),
            shape,
            args,
        }))
    }

    pub(crate) fn run(&self, launch: &Prepared) -> Result<()> {
        self.0
            .launch(launch.kernel, launch.shape, &launch.args)
            .map_err(|source| failed(launch.kernel, source))
    }
}

fn failed(kernel: &'static str, source: dtmem_host::Error) -> Error {
    Error::Launch {
        kernel,
        source: source.into(),
    }
}

/// A tensor's map as the executor has it.
fn encoded(map: TensorMap) -> dtmem_host::Result<dtmem_host::TensorMap> {
    if map.span.bytes == 0 {
        return Ok(dtmem_host::TensorMap::EMPTY);
    }
    dtmem_host::TensorMap::new(Boxes {
        address: map.span.address,
        element: map.element.bytes(),
        columns: map.columns,
        rows: map.rows,
        stride: map.stride,
        box_columns: map.box_columns(),
        box_rows: map.box_rows,
    })
}

impl Launcher for Host {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        match Self::prepare(launch)? {
            Some(prepared) => self.run(&prepared),
            None => Ok(()),
        }
    }

    fn can_launch(&self, _: &Launch<'_>) -> Result<bool> {
        Ok(true)
    }
}
