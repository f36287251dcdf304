//! The executor's model of a warpgroup's products against the PTX manual: where matrices lie in shared memory, which
//! thread has which element, and what may not be done around them.

mod common;

use common::{Random, Storage, in_every_order};
use dtmem_host::{Arg, Check, Executor, Finding, Launch, Order};
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;

/// Bytes of shared memory that the test kernel has.
const IMAGE: usize = 32768;
const ROWS: usize = 64;
const DEPTH: usize = 16;
const THREADS: usize = 128;

/// The swizzle of 128 bytes, copied from the manual's pictures: the place of each 16-byte piece in rows of 128 bytes.
const PLACES: [[usize; 8]; 8] = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [1, 0, 3, 2, 5, 4, 7, 6],
    [2, 3, 0, 1, 6, 7, 4, 5],
    [3, 2, 1, 0, 7, 6, 5, 4],
    [4, 5, 6, 7, 0, 1, 2, 3],
    [5, 4, 7, 6, 1, 0, 3, 2],
    [6, 7, 4, 5, 2, 3, 0, 1],
    [7, 6, 5, 4, 3, 2, 1, 0],
];

/// A matrix of 16-bit numbers in shared memory.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// A multiple of 1024, and of 32 up to 96 more where the depth runs along rows of 128 bytes.
    start: usize,
    /// Bytes from 64 columns to the next 64.
    leading: usize,
    /// Bytes from eight rows to the next eight.
    stride: usize,
}

impl Layout {
    /// Of element `k` of row (or column) `i`, which has its 16 numbers next to each other.
    fn along_depth(self, i: usize, k: usize) -> usize {
        let piece = self.start % 128 / 16 + k / 8;
        self.start / 1024 * 1024
            + i / 8 * self.stride
            + i % 8 * 128
            + PLACES[i % 8][piece] * 16
            + k % 8 * 2
    }

    /// Of column `n` of row `k`, which has its columns next to each other.
    fn across_depth(self, k: usize, n: usize) -> usize {
        self.start
            + n / 64 * self.leading
            + k / 8 * self.stride
            + k % 8 * 128
            + PLACES[k % 8][n % 64 / 8] * 16
            + n % 8 * 2
    }

    /// Start address, leading and stride without their low four bits; 1 in the last two bits.
    fn descriptor(self) -> i64 {
        let [start, leading, stride] =
            [self.start, self.leading, self.stride].map(|bytes| (bytes >> 4) as u64 & 0x3fff);
        (start | leading << 16 | stride << 32 | 1 << 62).cast_signed()
    }
}

/// The same as layouts of CuTe, which the manual's second description and CUTLASS's comments give: for T = 8 elements,
/// along the depth ((8,m),(T,2k)):((8T,SBO),(1,T)), across it ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), both behind
/// Swizzle<3,4,3> of the byte address.
#[test]
fn both_descriptions_of_the_layouts_are_one() {
    let swizzle = |address: usize| address ^ ((address >> 7 & 7) << 4);
    for (start, leading, stride) in [(0, 4096, 1024), (2048, 1024, 8192), (1024, 2048, 4096)] {
        for piece in [0, 2, 4, 6] {
            let layout = Layout {
                start: start + piece * 16,
                leading,
                stride,
            };
            for i in 0..128 {
                for k in 0..DEPTH {
                    let elements = i % 8 * 64 + k % 8 + k / 8 * 8;
                    let cute = swizzle(layout.start + elements * 2 + i / 8 * stride);
                    assert_eq!(layout.along_depth(i, k), cute);
                }
            }
        }
        let layout = Layout {
            start,
            leading,
            stride,
        };
        for k in 0..DEPTH {
            for n in 0..128 {
                let elements = n % 8 + n / 8 % 8 * 8 + k % 8 * 64;
                let cute = swizzle(start + elements * 2 + n / 64 * leading + k / 8 * stride);
                assert_eq!(layout.across_depth(k, n), cute);
            }
        }
    }
}

/// Row and column of element `i` of a thread's part of d: the figure of fragment D.
fn place_of_sum(thread: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (
        16 * warp + lane / 4 + i % 4 / 2 * 8,
        i / 4 * 8 + lane % 4 * 2 + i % 2,
    )
}

/// Row and column of element `i` (0 to 7) of a thread's part of a: the figure of fragment A.
fn place_of_factor(thread: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (
        16 * warp + lane / 4 + i / 2 % 2 * 8,
        lane % 4 * 2 + i % 2 + i / 4 * 8,
    )
}

#[derive(Debug, Clone)]
struct Case {
    columns: usize,
    transposed: bool,
    registers: bool,
    adds: bool,
    /// Where in a row of 128 bytes the depth of a and of b begins: 0 to 3, times 32 bytes.
    depths: [usize; 2],
    /// Eights of rows next to each other, or far apart with those of the other matrix in between.
    apart: bool,
    seed: u64,
}

impl Case {
    fn layouts(&self) -> [Layout; 2] {
        let (start, leading, stride) = match (self.apart, self.transposed) {
            (false, _) => (8192, 4096, 1024),
            (true, false) => (16384, 16, 1024),
            (true, true) => (1024, 8192, 4096),
        };
        let [depth_of_a, depth_of_b] = self.depths.map(|depth| depth * 32);
        let a = Layout {
            start: depth_of_a,
            leading: 16,
            stride: if self.apart { 2048 } else { 1024 },
        };
        let b = Layout {
            start: start + if self.transposed { 0 } else { depth_of_b },
            leading,
            stride,
        };
        [a, b]
    }
}

fn check_product<T: Storage>(case: &Case) {
    let n = case.columns;
    let mut random = Random(case.seed);
    let a = random.array::<T, _>((ROWS, DEPTH));
    let b = random.array::<T, _>((DEPTH, n));
    let before = random.array::<f32, _>((ROWS, n));
    let [layout_a, layout_b] = case.layouts();
    let mut image = [T::round(f64::NAN); IMAGE / 2];
    for ((row, k), &x) in a.indexed_iter() {
        image[layout_a.along_depth(row, k) / 2] = T::round(x);
    }
    for ((k, column), &x) in b.indexed_iter() {
        let at = match case.transposed {
            true => layout_b.across_depth(k, column),
            false => layout_b.along_depth(column, k),
        };
        image[at / 2] = T::round(x);
    }
    let image: Vec<u16> = image.iter().map(|x| x.bits() as u16).collect();
    let registers: Vec<u32> = (0..THREADS * 4)
        .map(|at| {
            let bits = |i| T::round(a[place_of_factor(at / 4, at % 4 * 2 + i)]).bits();
            bits(0) | bits(1) << 16
        })
        .collect();
    let place = |at| place_of_sum(at / (n / 2), at % (n / 2));
    let sums: Vec<f32> = (0..THREADS * n / 2)
        .map(|at| before[place(at)] as f32)
        .collect();

    let found = in_every_order(|executor| {
        let (image, registers) = (executor.upload(&image), executor.upload(&registers));
        let d = executor.upload(&sums);
        let args = [
            Arg::Input(image.view()),
            Arg::Input(registers.view()),
            Arg::Output(d.view()),
            Arg::I64(if case.registers {
                0
            } else {
                layout_a.descriptor()
            }),
            Arg::I64(layout_b.descriptor()),
            Arg::I32(case.transposed.into()),
            Arg::I32(case.adds.into()),
        ];
        let name = format!("test_wgmma_{n}_{}", T::NAME);
        executor
            .launch(&name, Launch::new([1, 1, 1], [128, 1, 1]), &args)
            .unwrap_or_else(|error| panic!("{error}"));
        d.download()
    });
    let expected = a.dot(&b)
        + if case.adds {
            before
        } else {
            Array2::zeros((ROWS, n))
        };
    let mut product = Array2::from_elem((ROWS, n), f64::NAN);
    for (at, &x) in found.iter().enumerate() {
        product[place(at)] = f64::from(x);
    }
    let product: Vec<f32> = product.iter().map(|&x| x as f32).collect();
    common::assert_close("d", &product, &expected, 2e-6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_read_and_write_what_the_manual_says(
        columns in prop::sample::select(vec![16_usize, 64, 128]),
        [transposed, registers, adds, apart] in any::<[bool; 4]>(),
        depths in prop::array::uniform2(0..4_usize),
        seed: u64,
    ) {
        let case = Case { columns, transposed, registers, adds, depths, apart, seed };
        check_product::<bf16>(&case);
        check_product::<f16>(&case);
    }
}

/// What the kernel with this defect ends with, in each order; `None`: a right end.
fn findings(defect: i32) -> [Option<Finding>; 3] {
    let mut random = Random(9);
    let x: Vec<bf16> = (0..4096).map(|_| bf16::round(random.normal())).collect();
    Order::ALL.map(|order| {
        let mut executor = Executor::new();
        executor.set_order(order);
        let (x, y) = (executor.upload(&x), executor.scratch::<f32>(4096));
        let args = [
            Arg::Input(x.view()),
            Arg::Output(y.view()),
            Arg::I32(defect),
        ];
        let ended = executor.launch("test_warpgroup", Launch::new([1, 1, 1], [128, 1, 1]), &args);
        let finding = ended
            .err()
            .map(|error| error.finding().cloned().expect("a finding"));
        println!("{defect}: {finding:?}");
        finding
    })
}

#[test]
fn a_kernel_with_all_fences_and_waits_is_right() {
    assert_eq!(findings(0), [None, None, None]);
}

/// The line of tests/kernels/warpgroup.cu that begins with `if (defect == …)`.
fn line_of(defect: i32) -> u32 {
    let source = include_str!("kernels/warpgroup.cu");
    let start = format!("if (defect == {defect})");
    let found = (1..)
        .zip(source.lines())
        .find(|(_, line)| line.trim_start().starts_with(&start));
    found.map_or(0, |(number, _)| number)
}

#[test]
fn each_misuse_is_found() {
    use Check::*;
    for (defect, allowed, what) in [
        (1, &[Unfenced][..], "stores without a fence of the proxy"),
        (2, &[Unfenced], "a copy that landed behind the fence"),
        (3, &[Unfenced], "the fence behind the barrier"),
        (4, &[Race, Uninitialised, Pending], "no barrier"),
        (5, &[Unfenced], "no fence of registers"),
        (6, &[Unfenced], "a register written behind the fence"),
        (7, &[Divergence], "three warps"),
        (8, &[Misaligned], "a tile that does not begin at a pattern"),
        (9, &[OutOfBounds, Uninitialised], "a tile that is not there"),
        (10, &[Collective], "descriptors that differ"),
        (11, &[InFlight], "no commit"),
        (12, &[Unawaited], "an end without a wait"),
        (13, &[InFlight], "a sum read too early"),
        (14, &[InFlight], "a sum written too early"),
        (15, &[InFlight], "a store to what is read"),
        (16, &[InFlight], "a copy to what is read"),
        (17, &[InFlight], "a wait for all but the group"),
        (
            18,
            &[Unfenced],
            "the result of one as the factor of the next, without a fence",
        ),
        (19, &[InFlight], "a factor written too early"),
        (20, &[Race], "a store behind one warp's own wait"),
    ] {
        for finding in findings(defect) {
            let finding = finding.unwrap_or_else(|| panic!("{what} was not found"));
            assert!(allowed.contains(&finding.check), "{what}: {finding}");
            if [13, 14, 15, 19, 20].contains(&defect) {
                let line = finding
                    .place
                    .location
                    .as_ref()
                    .map(|location| location.line);
                assert_eq!(line, Some(line_of(defect)), "{what}: {finding}");
            }
        }
    }
}

#[test]
fn registers_that_nobody_gives_cannot_be_taken() {
    let run = |executor: &Executor, defect| {
        let y = executor.scratch::<f32>(384);
        let args = [Arg::Output(y.view()), Arg::I32(defect)];
        let launch = Launch::new([1, 1, 1], [384, 1, 1]);
        executor
            .launch("test_registers", launch, &args)
            .map(|()| y.download())
    };
    let y = in_every_order(|executor| run(executor, 0).unwrap_or_else(|error| panic!("{error}")));
    assert_eq!(y, [1.0; 384]);
    for (defect, check) in [
        (1, Check::Collective), // gives more than it has
        (2, Check::Divergence), // gives nothing
        (3, Check::Divergence), // takes more than was given
        (4, Check::Divergence), // half of each warp
    ] {
        let mut executor = Executor::new();
        for order in Order::ALL {
            executor.set_order(order);
            let error = run(&executor, defect).expect_err("a defect");
            let found = error.finding().map(|finding| finding.check);
            assert_eq!(found, Some(check), "{defect}: {error}");
        }
    }
}
