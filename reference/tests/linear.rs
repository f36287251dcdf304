//! Linear maps and their low-rank adapters.

mod common;

use common::{Fixture, Random, assert_close, assert_slope, cast, finite_difference, poisoned};
use dtmem_reference::lora_linear::{Adapter, Adapters, Projection, ProjectionGradients};
use dtmem_reference::{Error, Scalar, linear, lora_linear};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use proptest::prelude::*;

/// x·weightᵀ by its definition, in f64.
fn product<T: Scalar>(x: ArrayView2<T>, weight: ArrayView2<T>) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), weight.nrows()), |(r, o)| {
        let terms = x.row(r).into_iter().zip(weight.row(o));
        terms.map(|(&x, &w)| x.to_f64() * w.to_f64()).sum()
    })
}

/// The name of the argument that an operation refused.
fn refused<R: std::fmt::Debug>(result: Result<R, Error>) -> &'static str {
    match result.expect_err("should have been refused") {
        Error::Shape { argument, .. } | Error::Value { argument, .. } => argument,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forward_is_the_definition_for_every_beta_and_layout(
        seed: u64, rows in 0_usize..40, inputs in 0_usize..40, outputs in 0_usize..40,
        transposed: bool, with_bias: bool,
    ) {
        let mut random = Random::new(seed);
        let wide: Array2<f32> = random.array([rows, inputs + 3]);
        let x = wide.slice_axis(Axis(1), Slice::from(2..inputs + 2));
        let stored: Array2<f32> = random.array(if transposed { [inputs, outputs] } else { [outputs, inputs] });
        let weight = if transposed { stored.t() } else { stored.view() };
        let bias: Array1<f32> = random.array([outputs]);
        let bias = with_bias.then_some(bias.view());
        let old: Array2<f32> = random.array([rows, outputs + 1]);
        for beta in [0.0_f32, 1.0, -0.5] {
            let mut wide = if beta == 0.0 { poisoned([rows, outputs + 1]) } else { old.clone() };
            let mut y = wide.slice_axis_mut(Axis(1), Slice::from(1..));
            linear::forward(x, weight, bias, beta, y.view_mut())?;
            let mut expected = product(x, weight);
            if let Some(bias) = bias {
                expected += &cast::<_, f64, _>(&bias.to_owned());
            }
            if beta != 0.0 {
                let old = cast::<_, f64, _>(&old) * f64::from(beta);
                expected += &old.slice_axis(Axis(1), Slice::from(1..));
            }
            assert_close("y", &y, &expected, 2e-5);
        }
    }

    #[test]
    fn rows_and_columns_computed_apart_are_the_bits_of_the_whole(
        seed: u64, rows in 1_usize..70, inputs in 1_usize..300, outputs in 1_usize..70,
        split in 0.0..1.0,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f32> = random.array([rows, inputs]);
        let weight: Array2<f32> = random.array([outputs, inputs]);
        let bias: Array1<f32> = random.array([outputs]);
        let whole = {
            let mut y = poisoned([rows, outputs]);
            linear::forward(x.view(), weight.view(), Some(bias.view()), 0.0, y.view_mut())?;
            y
        };
        let mut parts: Array2<f32> = poisoned([rows, outputs]);
        let (r, o) = ((rows as f64 * split) as usize, (outputs as f64 * split) as usize);
        for rows in [Slice::from(..r), Slice::from(r..)] {
            for outputs in [Slice::from(..o), Slice::from(o..)] {
                let mut y = parts.slice_axis_mut(Axis(0), rows);
                linear::forward(
                    x.slice_axis(Axis(0), rows),
                    weight.slice_axis(Axis(0), outputs),
                    Some(bias.slice_axis(Axis(0), outputs)),
                    0.0,
                    y.slice_axis_mut(Axis(1), outputs),
                )?;
            }
        }
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn gradients_are_the_finite_differences(
        seed: u64, rows in 0_usize..6, inputs in 0_usize..6, outputs in 0_usize..6,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f64> = random.array([rows, inputs]);
        let weight: Array2<f64> = random.array([outputs, inputs]);
        let bias: Array1<f64> = random.array([outputs]);
        let dy: Array2<f64> = random.array([rows, outputs]);
        let loss = |x: &Array2<f64>, weight: &Array2<f64>, bias: &Array1<f64>| {
            let mut y = poisoned([rows, outputs]);
            linear::forward(x.view(), weight.view(), Some(bias.view()), 0.0, y.view_mut())
                .expect("forward");
            (&y * &dy).sum()
        };

        let mut dx = poisoned([rows, inputs]);
        linear::backward_input(dy.view(), weight.view(), 0.0, dx.view_mut())?;
        let expected = finite_difference(&x, |x| loss(x, &weight, &bias));
        assert_slope("dx", &dx, &expected);
        linear::backward_input(dy.view(), weight.view(), 2.0, dx.view_mut())?;
        assert_slope("dx on top of itself twice", &dx, &(&expected * 3.0));

        let old: Array2<f64> = random.array([outputs, inputs]);
        let mut dweight = old.clone();
        linear::backward_weight(dy.view(), x.view(), dweight.view_mut())?;
        let expected = finite_difference(&weight, |weight| loss(&x, weight, &bias));
        assert_slope("dweight", &dweight, &(old + expected));

        let old: Array1<f64> = random.array([outputs]);
        let mut dbias = old.clone();
        linear::backward_bias(dy.view(), dbias.view_mut())?;
        let expected = finite_difference(&bias, |bias| loss(&x, &weight, bias));
        assert_slope("dbias", &dbias, &(old + expected));
    }
}

#[test]
fn wrong_shapes_are_refused_by_name() {
    let a = |rows, columns| Array2::<f32>::zeros([rows, columns]);
    let forward = |weight: Array2<f32>, bias: usize, mut y: Array2<f32>| {
        let bias = Array1::zeros(bias);
        let x = a(2, 3);
        let result = linear::forward(
            x.view(),
            weight.view(),
            Some(bias.view()),
            0.0,
            y.view_mut(),
        );
        refused(result)
    };
    assert_eq!(forward(a(4, 5), 4, a(2, 4)), "weight");
    assert_eq!(forward(a(4, 3), 3, a(2, 4)), "bias");
    assert_eq!(forward(a(4, 3), 4, a(2, 3)), "y");
    let dy = a(2, 4);
    let input = |weight: Array2<f32>, mut dx: Array2<f32>| {
        refused(linear::backward_input(
            dy.view(),
            weight.view(),
            0.0,
            dx.view_mut(),
        ))
    };
    assert_eq!(input(a(3, 4), a(2, 4)), "weight");
    assert_eq!(input(a(4, 3), a(2, 4)), "dx");
    let weight = |x: Array2<f32>, mut dweight: Array2<f32>| {
        refused(linear::backward_weight(
            dy.view(),
            x.view(),
            dweight.view_mut(),
        ))
    };
    assert_eq!(weight(a(3, 3), a(4, 3)), "x");
    assert_eq!(weight(a(2, 3), a(3, 4)), "dweight");
    let mut dbias = Array1::zeros(3);
    assert_eq!(
        refused(linear::backward_bias(dy.view(), dbias.view_mut())),
        "dbias"
    );
}

/// Arrays of one projection with an adapter.
struct Adapted<T> {
    weight: Array2<T>,
    bias: Array1<T>,
    a: Array2<T>,
    b: Array2<T>,
    scaling: T,
}

impl<T: Scalar> Adapted<T> {
    fn random(random: &mut Random, inputs: usize, outputs: usize, rank: usize) -> Self {
        Self {
            weight: random.array([outputs, inputs]),
            bias: random.array([outputs]),
            a: random.array([rank, inputs]),
            b: random.array([outputs, rank]),
            scaling: T::from_f64(random.normal()),
        }
    }

    fn adapter(&self) -> Adapter<'_, T> {
        Adapter {
            a: self.a.view(),
            b: self.b.view(),
            scaling: self.scaling,
        }
    }

    fn projection(&self) -> Projection<'_, T> {
        Projection {
            weight: self.weight.view(),
            bias: Some(self.bias.view()),
            adapter: Some(self.adapter()),
        }
    }

    fn merged(&self) -> Array2<T> {
        let mut merged = poisoned(self.weight.raw_dim());
        lora_linear::merge(self.weight.view(), self.adapter(), merged.view_mut()).expect("merge");
        merged
    }
}

/// The outputs of all projections, and xa.
fn project<T: Scalar>(
    x: &Array2<T>,
    projections: &[Projection<T>],
) -> (Vec<Array2<T>>, Vec<Array2<T>>) {
    let widths = projections.iter().map(|p| p.weight.nrows());
    let ranks = projections
        .iter()
        .map(|p| p.adapter.map_or(0, |adapter| adapter.a.nrows()));
    let mut outputs: Vec<_> = widths.map(|width| poisoned([x.nrows(), width])).collect();
    let mut xa: Vec<_> = ranks.map(|rank| poisoned([x.nrows(), rank])).collect();
    lora_linear::forward(
        x.view(),
        projections,
        &mut views_mut(&mut xa),
        &mut views_mut(&mut outputs),
    )
    .expect("forward");
    (outputs, xa)
}

fn views<T>(arrays: &[Array2<T>]) -> Vec<ArrayView2<'_, T>> {
    arrays.iter().map(|array| array.view()).collect()
}

fn views_mut<T>(arrays: &mut [Array2<T>]) -> Vec<ArrayViewMut2<'_, T>> {
    arrays.iter_mut().map(|array| array.view_mut()).collect()
}

fn lora_agrees_with_the_fixtures<T: Scalar>(tolerance: f64) {
    for (name, fixture) in Fixture::all("lora_") {
        let close = |tensor: &str, found: &Array2<T>, expected: &str| {
            assert_close(
                &format!("{name} {tensor}"),
                found,
                &fixture.array(expected),
                tolerance,
            );
        };
        let x: Array2<T> = fixture.array("input.x");
        let adapted = Adapted {
            weight: fixture.array("input.weight"),
            bias: fixture.array("input.bias"),
            a: fixture.array("input.lora_a"),
            b: fixture.array("input.lora_b"),
            scaling: T::from_f64(fixture.number("scaling")),
        };
        close("merged", &adapted.merged(), "output.merged_weight");
        let (outputs, xa) = project(&x, &[adapted.projection()]);
        close("y", &outputs[0], "output.y");
        let dy: Array2<T> = fixture.array("grad_output.y");
        let mut dx = poisoned(x.raw_dim());
        let mut dxa = vec![poisoned(xa[0].raw_dim())];
        let mut dweight = Array2::zeros(adapted.weight.raw_dim());
        let mut dbias = Array1::zeros(adapted.bias.len());
        let mut da = Array2::zeros(adapted.a.raw_dim());
        let mut db = Array2::zeros(adapted.b.raw_dim());
        let mut gradients = [ProjectionGradients {
            weight: Some(dweight.view_mut()),
            bias: Some(dbias.view_mut()),
            adapter: Some((da.view_mut(), db.view_mut())),
        }];
        lora_linear::backward(
            x.view(),
            &[adapted.projection()],
            &views(&xa),
            &[dy.view()],
            &mut views_mut(&mut dxa),
            dx.view_mut(),
            &mut gradients,
        )
        .expect("backward");
        close("dx", &dx, "grad_input.x");
        close("dweight", &dweight, "grad_input.weight");
        close("da", &da, "grad_input.lora_a");
        close("db", &db, "grad_input.lora_b");
        assert_close(
            "dbias",
            &dbias,
            &fixture.array("grad_input.bias"),
            tolerance,
        );
    }
}

#[test]
fn lora_agrees_with_the_fixtures_in_f64() {
    lora_agrees_with_the_fixtures::<f64>(1e-10);
}

#[test]
fn lora_agrees_with_the_fixtures_in_f32() {
    lora_agrees_with_the_fixtures::<f32>(2e-5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn merged_and_unmerged_projections_agree_and_the_weight_stays(
        seed: u64, rows in 0_usize..9, inputs in 1_usize..40, outputs in 0_usize..40, rank in 0_usize..9,
    ) {
        let mut random = Random::new(seed);
        let adapted = Adapted::<f32>::random(&mut random, inputs, outputs, rank);
        let before = adapted.weight.clone();
        let merged = adapted.merged();
        prop_assert_eq!(&adapted.weight, &before);
        let x: Array2<f32> = random.array([rows, inputs]);
        let (apart, _) = project(&x, &[adapted.projection()]);
        let whole = Projection { weight: merged.view(), adapter: None, ..adapted.projection() };
        let (together, _) = project(&x, &[whole]);
        assert_close("merged", &together[0], &cast(&apart[0]), 2e-5);
        // B = 0, as it is initialised: bit by bit the plain map.
        let fresh = Adapted { b: Array2::zeros([outputs, rank]), ..adapted };
        prop_assert_eq!(fresh.merged(), before.clone());
        let plain = Projection { adapter: None, ..fresh.projection() };
        prop_assert_eq!(&project(&x, &[fresh.projection()]).0, &project(&x, &[plain]).0);
    }

    #[test]
    fn gradients_of_several_projections_are_the_finite_differences(
        seed: u64, rows in 0_usize..4, inputs in 0_usize..5, outputs in 0_usize..5,
        rank in 0_usize..4,
    ) {
        let mut random = Random::new(seed);
        let mut first = Adapted::<f64>::random(&mut random, inputs, outputs, rank);
        let second = Adapted::<f64>::random(&mut random, inputs, outputs + 1, rank + 1);
        // The first trains its adapter only, the second has none and trains its weight, the third
        // trains everything.
        let third = Adapted::<f64>::random(&mut random, inputs, 2, 1);
        let x: Array2<f64> = random.array([rows, inputs]);
        let dy: Vec<Array2<f64>> =
            [outputs, outputs + 1, 2].map(|width| random.array([rows, width])).into();
        let projections = |first: &Adapted<f64>| -> Vec<(Array2<f64>, Array2<f64>)> {
            let plain = Projection { adapter: None, ..second.projection() };
            let (y, _) = project(&x, &[first.projection(), plain, third.projection()]);
            y.into_iter().zip(dy.clone()).collect()
        };
        let loss = |first: &Adapted<f64>| -> f64 {
            projections(first).iter().map(|(y, dy)| (y * dy).sum()).sum()
        };

        let plain = Projection { adapter: None, ..second.projection() };
        let all = [first.projection(), plain, third.projection()];
        let (_, xa) = project(&x, &all);
        let mut dxa: Vec<_> = xa.iter().map(|xa| poisoned(xa.raw_dim())).collect();
        let mut dx = poisoned(x.raw_dim());
        let old_a: Array2<f64> = random.array([rank, inputs]);
        let old_b: Array2<f64> = random.array([outputs, rank]);
        let (mut da, mut db) = (old_a.clone(), old_b.clone());
        let mut dweight2 = Array2::zeros(second.weight.raw_dim());
        let mut dbias2 = Array1::zeros(second.bias.len());
        let mut dweight3 = Array2::zeros(third.weight.raw_dim());
        let (mut da3, mut db3) = (Array2::zeros([1, inputs]), Array2::zeros([2, 1]));
        let mut gradients = [
            ProjectionGradients {
                weight: None,
                bias: None,
                adapter: Some((da.view_mut(), db.view_mut())),
            },
            ProjectionGradients {
                weight: Some(dweight2.view_mut()),
                bias: Some(dbias2.view_mut()),
                adapter: None,
            },
            ProjectionGradients {
                weight: Some(dweight3.view_mut()),
                bias: None,
                adapter: Some((da3.view_mut(), db3.view_mut())),
            },
        ];
        lora_linear::backward(
            x.view(), &all, &views(&xa), &views(&dy), &mut views_mut(&mut dxa), dx.view_mut(),
            &mut gradients,
        )?;

        let expected = finite_difference(&x, |x| {
            let (y, _) = project(x, &all);
            y.iter().zip(&dy).map(|(y, dy)| (y * dy).sum()).sum()
        });
        assert_slope("dx", &dx, &expected);
        assert_close("dweight of the second", &dweight2, &dy[1].t().dot(&x), 1e-12);
        assert_close("dbias of the second", &dbias2, &dy[1].sum_axis(Axis(0)), 1e-12);
        assert_close("dweight of the third", &dweight3, &dy[2].t().dot(&x), 1e-12);
        let expected = third.b.t().dot(&dy[2].t().dot(&x)) * third.scaling;
        assert_close("da of the third", &da3, &expected, 1e-11);
        let expected = dy[2].t().dot(&x).dot(&third.a.t()) * third.scaling;
        assert_close("db of the third", &db3, &expected, 1e-11);
        let kept = first.a.clone();
        let expected = finite_difference(&kept, |a| {
            first.a.assign(a);
            loss(&first)
        });
        first.a.assign(&kept);
        assert_slope("da", &da, &(old_a + expected));
        let kept = first.b.clone();
        let expected = finite_difference(&kept, |b| {
            first.b.assign(b);
            loss(&first)
        });
        assert_slope("db", &db, &(old_b + expected));
    }
}

/// Adapters of one weight, and a pack whose sequences have one of them each, or none.
struct Packed {
    adapters: Vec<Adapted<f64>>,
    cu_seqlens: Vec<i32>,
    index: Vec<i32>,
}

impl Packed {
    fn random(random: &mut Random, lengths: &[usize], sizes: [usize; 3], adapters: usize) -> Self {
        let [inputs, outputs, rank] = sizes;
        let adapters: Vec<_> = (0..adapters)
            .map(|_| Adapted::random(random, inputs, outputs, rank))
            .collect();
        let mut cu_seqlens = vec![0];
        for &length in lengths {
            cu_seqlens.push(cu_seqlens.last().unwrap() + length as i32);
        }
        let index = lengths
            .iter()
            .map(|_| random.below(adapters.len() + 1) as i32 - 1)
            .collect();
        Self {
            adapters,
            cu_seqlens,
            index,
        }
    }

    /// y += the adapters' share of x, and xa.
    fn forward(&self, x: &Array2<f64>, y: &mut Array2<f64>, rank: usize) -> Array2<f64> {
        let list: Vec<_> = self.adapters.iter().map(Adapted::adapter).collect();
        let mut xa = poisoned([x.nrows(), rank]);
        let adapters = Adapters {
            list: &list,
            cu_seqlens: &self.cu_seqlens,
            index: &self.index,
        };
        lora_linear::forward_adapters(x.view(), adapters, xa.view_mut(), y.view_mut())
            .expect("forward");
        xa
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn each_sequence_has_its_own_adapter(
        seed: u64, lengths in prop::collection::vec(0_usize..5, 0..5), inputs in 1_usize..6,
        outputs in 1_usize..6, rank in 1_usize..4, adapters in 1_usize..4,
    ) {
        let mut random = Random::new(seed);
        let mut packed = Packed::random(&mut random, &lengths, [inputs, outputs, rank], adapters);
        let rows = lengths.iter().sum();
        let x: Array2<f64> = random.array([rows, inputs]);
        let dy: Array2<f64> = random.array([rows, outputs]);
        let before: Array2<f64> = random.array([rows, outputs]);
        let mut y = before.clone();
        let xa = packed.forward(&x, &mut y, rank);

        // By the definition, row by row.
        let mut row = 0;
        for (&length, &index) in lengths.iter().zip(&packed.index) {
            for _ in 0..length {
                let mut expected = before.row(row).to_owned();
                if let Ok(index) = usize::try_from(index) {
                    let Adapted { a, b, scaling, .. } = &packed.adapters[index];
                    expected += &(b.dot(&a.dot(&x.row(row))) * *scaling);
                } else {
                    prop_assert!(xa.row(row).iter().all(|&xa| xa == 0.0));
                }
                assert_close("y", &y.row(row).to_owned(), &expected, 1e-12);
                row += 1;
            }
        }

        let old: Vec<[Array2<f64>; 2]> = (0..adapters)
            .map(|_| [random.array([rank, inputs]), random.array([outputs, rank])])
            .collect();
        let mut found = old.clone();
        let old_dx: Array2<f64> = random.array([rows, inputs]);
        let mut dx = old_dx.clone();
        let mut dxa = poisoned([rows, rank]);
        {
            let list: Vec<_> = packed.adapters.iter().map(Adapted::adapter).collect();
            let pack = Adapters { list: &list, cu_seqlens: &packed.cu_seqlens, index: &packed.index };
            let mut gradients: Vec<_> =
                found.iter_mut().map(|[da, db]| (da.view_mut(), db.view_mut())).collect();
            lora_linear::backward_adapters(
                x.view(), xa.view(), pack, dy.view(), dxa.view_mut(), Some(dx.view_mut()),
                &mut gradients,
            )?;
        }
        prop_assert!(dxa.iter().all(|dxa| dxa.is_finite()));
        let loss = |packed: &Packed, x: &Array2<f64>| {
            let mut y = Array2::zeros([rows, outputs]);
            packed.forward(x, &mut y, rank);
            (&y * &dy).sum()
        };
        let slope = finite_difference(&x, |x| loss(&packed, x));
        assert_slope("dx", &dx, &(old_dx + slope));
        for index in 0..adapters {
            let kept = packed.adapters[index].a.clone();
            let slope = finite_difference(&kept, |a| {
                packed.adapters[index].a.assign(a);
                loss(&packed, &x)
            });
            packed.adapters[index].a.assign(&kept);
            assert_slope("da", &found[index][0], &(&old[index][0] + &slope));
            let kept = packed.adapters[index].b.clone();
            let slope = finite_difference(&kept, |b| {
                packed.adapters[index].b.assign(b);
                loss(&packed, &x)
            });
            packed.adapters[index].b.assign(&kept);
            assert_slope("db", &found[index][1], &(&old[index][1] + &slope));
        }
    }
}

#[test]
fn packs_that_do_not_match_the_rows_or_the_adapters_are_refused_by_name() {
    let mut random = Random::new(5);
    let packed = Packed::random(&mut random, &[2, 1], [3, 4, 1], 2);
    let list: Vec<_> = packed.adapters.iter().map(Adapted::adapter).collect();
    let forward = |cu_seqlens: &[i32], index: &[i32], [x, xa, y]: [usize; 3]| {
        let adapters = Adapters {
            list: &list,
            cu_seqlens,
            index,
        };
        refused(lora_linear::forward_adapters(
            Array2::zeros([x, 3]).view(),
            adapters,
            Array2::zeros([xa, 1]).view_mut(),
            Array2::zeros([y, 4]).view_mut(),
        ))
    };
    assert_eq!(forward(&[0, 2, 3], &[0, 2], [3; 3]), "index");
    assert_eq!(forward(&[0, 2, 3], &[0], [3; 3]), "index");
    assert_eq!(forward(&[0, 2, 4], &[0, 1], [3; 3]), "cu_seqlens");
    assert_eq!(forward(&[0, 2, 3], &[0, 1], [3, 2, 3]), "xa");
    assert_eq!(forward(&[0, 2, 3], &[0, 1], [3, 3, 4]), "y");
    let backward = |gradients: usize, [xa, dy, dxa, dx]: [usize; 4]| {
        let adapters = Adapters {
            list: &list,
            cu_seqlens: &[0, 2, 3],
            index: &[-1, 1],
        };
        let mut places = vec![(Array2::zeros([1, 3]), Array2::zeros([4, 1])); gradients];
        let mut gradients: Vec<_> = places
            .iter_mut()
            .map(|(da, db)| (da.view_mut(), db.view_mut()))
            .collect();
        refused(lora_linear::backward_adapters(
            Array2::zeros([3, 3]).view(),
            Array2::zeros([xa, 1]).view(),
            adapters,
            Array2::zeros([dy, 4]).view(),
            Array2::zeros([dxa, 1]).view_mut(),
            Some(Array2::zeros([dx, 3]).view_mut()),
            &mut gradients,
        ))
    };
    assert_eq!(backward(1, [3; 4]), "gradients");
    assert_eq!(backward(2, [2, 3, 3, 3]), "xa");
    assert_eq!(backward(2, [3, 2, 3, 3]), "dy");
    assert_eq!(backward(2, [3, 3, 2, 3]), "dxa");
    assert_eq!(backward(2, [3, 3, 3, 4]), "dx");
}

#[test]
fn wrong_adapters_are_refused_by_name() {
    let a = |rows, columns| Array2::<f32>::zeros([rows, columns]);
    let x = a(2, 3);
    // Right: A [1, 3], B [4, 1], y [2, 4].
    let forward = |lora_a: Array2<f32>, b: Array2<f32>, mut xa: Array2<f32>, mut y: Array2<f32>| {
        let adapter = Adapter {
            a: lora_a.view(),
            b: b.view(),
            scaling: 1.0,
        };
        refused(lora_linear::forward_adapter(
            x.view(),
            adapter,
            xa.view_mut(),
            y.view_mut(),
        ))
    };
    assert_eq!(forward(a(1, 2), a(4, 1), a(2, 1), a(2, 4)), "adapter.a");
    assert_eq!(forward(a(1, 3), a(4, 2), a(2, 1), a(2, 4)), "adapter.b");
    assert_eq!(forward(a(1, 3), a(4, 1), a(2, 2), a(2, 4)), "xa");
    assert_eq!(forward(a(1, 3), a(4, 1), a(2, 1), a(1, 4)), "y");
    let (lora_a, b) = (a(1, 3), a(4, 1));
    let adapter = Adapter {
        a: lora_a.view(),
        b: b.view(),
        scaling: 1.0,
    };
    let backward = |shapes: [[usize; 2]; 6]| {
        let [xa, dy, mut dxa, mut dx, mut da, mut db] = shapes.map(Array2::<f32>::zeros);
        refused(lora_linear::backward_adapter(
            x.view(),
            xa.view(),
            adapter,
            dy.view(),
            dxa.view_mut(),
            Some(dx.view_mut()),
            da.view_mut(),
            db.view_mut(),
        ))
    };
    let right = [[2, 1], [2, 4], [2, 1], [2, 3], [1, 3], [4, 1]];
    for (wrong, name) in ["xa", "adapter.b", "dxa", "dx", "da", "db"]
        .into_iter()
        .enumerate()
    {
        let mut shapes = right;
        shapes[wrong] = [2, 5];
        assert_eq!(backward(shapes), name);
    }
    let weight = a(4, 3);
    let mut merged = a(3, 4);
    let result = lora_linear::merge(weight.view(), adapter, merged.view_mut());
    assert_eq!(refused(result), "merged");
    let result = lora_linear::merge(merged.view(), adapter, a(3, 4).view_mut());
    assert_eq!(refused(result), "adapter.a");
}

#[test]
fn lists_that_do_not_match_the_projections_are_refused_by_name() {
    let mut random = Random::new(3);
    let adapted = Adapted::<f32>::random(&mut random, 3, 4, 1);
    let x: Array2<f32> = random.array([2, 3]);
    let all = [adapted.projection()];
    let forward = |xa: usize, outputs: usize| {
        let mut xa = vec![Array2::zeros([2, 1]); xa];
        let mut outputs = vec![Array2::zeros([2, 4]); outputs];
        let result = lora_linear::forward(
            x.view(),
            &all,
            &mut views_mut(&mut xa),
            &mut views_mut(&mut outputs),
        );
        refused(result)
    };
    assert_eq!(forward(0, 1), "xa");
    assert_eq!(forward(1, 2), "outputs");
    let backward = |[xa, dy, dxa, gradients]: [usize; 4], dx: usize| {
        let (xa, mut dxa) = (
            vec![Array2::zeros([2, 1]); xa],
            vec![Array2::zeros([2, 1]); dxa],
        );
        let dy = vec![Array2::zeros([2, 4]); dy];
        let empty = || ProjectionGradients {
            weight: None,
            bias: None,
            adapter: None,
        };
        let mut gradients: Vec<_> = (0..gradients).map(|_| empty()).collect();
        refused(lora_linear::backward(
            x.view(),
            &all,
            &views(&xa),
            &views(&dy),
            &mut views_mut(&mut dxa),
            Array2::zeros([2, dx]).view_mut(),
            &mut gradients,
        ))
    };
    assert_eq!(backward([0, 1, 1, 1], 3), "xa");
    assert_eq!(backward([1, 0, 1, 1], 3), "dy");
    assert_eq!(backward([1, 1, 2, 1], 3), "dxa");
    assert_eq!(backward([1, 1, 1, 0], 3), "gradients");
    assert_eq!(backward([1, 1, 1, 1], 2), "dx");
    // An adapter without a place for its gradients.
    assert_eq!(backward([1, 1, 1, 1], 3), "gradients");
}
