//! The memory loss on what a memory recalls, against the equations of its documentation.

mod common;

use common::{Random, assert_close, finite_difference};
use dtmem_reference::attention::Pairs;
use dtmem_reference::content_memory::{Addressing, ContentMemory, Erase, Inputs, Order, Strength};
use dtmem_reference::recall::recall_loss;
use ndarray::{Array1, Array2, ArrayView2, s};
use proptest::prelude::*;

const SLOTS: usize = 5;
const WIDTH: usize = 4;
const SEGMENTS: usize = 3;
const TOKENS: usize = 3;

fn variant(erase: Erase) -> ContentMemory {
    ContentMemory {
        addressing: Addressing::Cosine,
        strength: Strength::Sigmoid,
        erase,
        order: Order::ReadThenWrite,
        top_k: None,
        scale: 0.5,
        epsilon: 1e-6,
    }
}

proptest! {
    /// R_qp = Σ_i w_iq · Π keep_i · w_ip β_ip, from addresses and strengths alone.
    #[test]
    fn a_carried_column_is_the_share_of_its_tokens_value(seed: u64, paper: bool) {
        let mut random = Random::new(seed);
        let variant = variant(if paper { Erase::Paper } else { Erase::Coupled });
        let total = SEGMENTS * TOKENS;
        let keys: [Array2<f64>; 2] = [(); 2].map(|()| random.array((total, WIDTH)));
        let strength = Array1::from_shape_simple_fn(total, || 1.0 + 3.0 * random.uniform());
        // Every token has a column of its own.
        let mut values: Array2<f64> = random.array((total, WIDTH + total));
        values.slice_mut(s![.., WIDTH..]).assign(&Array2::eye(total));
        let mut memory: Array2<f64> = random.array((SLOTS, WIDTH + total));
        memory.slice_mut(s![.., WIDTH..]).fill(0.0);

        let (mut w, mut gate) = (Array2::zeros((total, SLOTS)), Array2::zeros((total, SLOTS)));
        let mut keep = Array2::ones((SEGMENTS, SLOTS));
        let mut read = Array2::zeros((total, WIDTH + total));
        for segment in 0..SEGMENTS {
            let rows = s![segment * TOKENS..(segment + 1) * TOKENS, ..];
            let inputs = Inputs {
                memory: memory.view(),
                address_key: keys[0].slice(rows),
                strength_key: keys[1].slice(rows),
                value: values.slice(rows),
                key_strength: Some(strength.slice(s![segment * TOKENS..(segment + 1) * TOKENS])),
                strength_bias: 0.3,
            };
            let mut beta = Array2::zeros((TOKENS, SLOTS));
            variant.address(inputs, w.slice_mut(rows), beta.view_mut()).unwrap();
            gate.slice_mut(rows).assign(&(&beta * &w.slice(rows)));
            let erased = match variant.erase {
                Erase::Coupled => gate.slice(rows).to_owned(),
                Erase::Paper => &w.slice(rows) * &beta.mapv(|beta| 1.0 - beta),
            };
            for token in erased.rows() {
                let mut keep = keep.row_mut(segment);
                keep *= &token.mapv(|erased| 1.0 - erased);
            }
            let mut next = Array2::zeros(memory.dim());
            let to = read.slice_mut(rows);
            variant.forward(inputs, next.view_mut(), to, &mut Vec::new()).unwrap();
            memory = next;
        }

        let expected = Array2::from_shape_fn((total, total), |(q, p)| {
            let (later, earlier) = (q / TOKENS, p / TOKENS);
            if earlier >= later {
                return 0.0;
            }
            let kept = |i: usize| keep.slice(s![earlier + 1..later, i]).product();
            (0..SLOTS).map(|i| w[[q, i]] * kept(i) * gate[[p, i]]).sum()
        });
        assert_close("recall", &read.slice(s![.., WIDTH..]).to_owned(), &expected, 1e-12);
    }

    #[test]
    fn loss_and_gradient_match_their_equations(seed: u64, tokens in 0_usize..5, columns in 0_usize..5) {
        let mut random = Random::new(seed);
        let first = 6;
        // The last column is a token of the segment itself: it takes no part.
        let mut recalled: Vec<i32> = (0..columns as i32).collect();
        recalled.push(first + 1);
        let recall = Array2::from_shape_simple_fn((tokens, recalled.len()), || {
            0.02 + 0.96 * random.uniform()
        });
        let (mut offsets, mut keys) = (vec![0], Vec::new());
        for token in 0..tokens as i32 {
            keys.extend((0..columns as i32).filter(|key| (key + token) % 3 == 0));
            keys.push(first + token);
            offsets.push(keys.len() as i32);
        }
        let pairs = Pairs { offsets: &offsets, keys: &keys };
        let loss = |recall: ArrayView2<f64>| {
            let mut gradient = Array2::from_elem(recall.dim(), f64::NAN);
            let to = gradient.view_mut();
            let loss = recall_loss(recall, &recalled, first, pairs, 0.7, to).unwrap();
            (loss, gradient)
        };
        let (found, gradient) = loss(recall.view());
        let mut expected = 0.0;
        for token in 0..tokens {
            for column in 0..columns {
                let r = recall[[token, column]];
                expected -= if (column + token) % 3 == 0 { r.ln() } else { (1.0 - r).ln() };
            }
        }
        prop_assert!((found - expected).abs() <= 1e-12 * expected.abs());
        let numeric = finite_difference(&recall, |recall| 0.7 * loss(recall.view()).0);
        prop_assert!((&gradient - &numeric).iter().all(|d| d.abs() < 1e-5));
    }
}

#[test]
fn nothing_recalled_and_everything_recalled_stay_finite() {
    let recall = Array2::from_shape_vec((1, 3), vec![0.0_f32, 1.0, 1.0 + f32::EPSILON]).unwrap();
    let pairs = Pairs {
        offsets: &[0, 1],
        keys: &[0],
    };
    let mut gradient = Array2::from_elem((1, 3), f32::NAN);
    let loss = recall_loss(
        recall.view(),
        &[0, 1, 2],
        3,
        pairs,
        1e-3,
        gradient.view_mut(),
    )
    .unwrap();
    assert_eq!(loss, 300.0); // three logarithms at their floor
    assert!(gradient.iter().all(|g| g.is_finite() && *g != 0.0));
}

#[test]
fn a_share_that_is_not_a_number_is_passed_on() {
    let recall = Array2::from_elem((1, 1), f64::NAN);
    let pairs = Pairs {
        offsets: &[0, 0],
        keys: &[],
    };
    let mut gradient = Array2::zeros((1, 1));
    let loss = recall_loss(recall.view(), &[0], 1, pairs, 1.0, gradient.view_mut()).unwrap();
    assert!(loss.is_nan() && gradient[[0, 0]].is_nan());
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let recall = Array2::<f64>::zeros((2, 3));
    let pairs = Pairs {
        offsets: &[0, 0],
        keys: &[],
    };
    let mut gradient = Array2::zeros((2, 3));
    let error = recall_loss(
        recall.view(),
        &[0, 1, 2],
        3,
        pairs,
        1.0,
        gradient.view_mut(),
    );
    assert!(error.unwrap_err().to_string().contains("pair_offsets"));
    let error = recall_loss(recall.view(), &[0], 3, pairs, 1.0, gradient.view_mut());
    assert!(error.unwrap_err().to_string().contains("recall"));
}
