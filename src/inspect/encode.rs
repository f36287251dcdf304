//! Maps of shares as text, small enough for pages of long episodes.
//!
//! A share p in 0 to 1 is written as n = round(√p · 4095) in two characters of a 64-letter
//! alphabet: exact to about 1 % of a share of 0.0025, and to 0.0005 at 1. Runs of zeros are a `~`
//! and their length. Rows follow one another.

use ndarray::{Array2, ArrayView2};

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const MOST: usize = 64 * 64 - 1;
const RUN: char = '~';
/// Shares below this are left out, the smallest first that makes maps small enough.
const FLOORS: [f64; 5] = [0.0, 1e-4, 1e-3, 1e-2, 1e-1];

/// A map as text; shares below `floor` become 0.
pub fn encode(map: ArrayView2<f64>, floor: f64) -> String {
    let mut text = String::new();
    let mut zeros = 0;
    for &share in map {
        let number = (share.clamp(0.0, 1.0).sqrt() * MOST as f64).round();
        if share < floor || number.is_nan() || number < 1.0 {
            zeros += 1;
            continue;
        }
        push_zeros(&mut text, std::mem::take(&mut zeros));
        push(&mut text, number as usize);
    }
    push_zeros(&mut text, zeros);
    text
}

/// The maps of one kind as text, and the floor that keeps them within `budget` characters
/// altogether, as far as any does.
pub(super) fn encode_all(maps: &[ArrayView2<f64>], budget: usize) -> (Vec<String>, f64) {
    let at = |floor: f64| -> Vec<String> { maps.iter().map(|map| encode(*map, floor)).collect() };
    for floor in FLOORS {
        let texts = at(floor);
        if texts.iter().map(String::len).sum::<usize>() <= budget {
            return (texts, floor);
        }
    }
    let most = FLOORS[FLOORS.len() - 1];
    (at(most), most)
}

/// Reads what [`encode`] wrote, a map of so many rows and columns; none if it is not one.
pub fn decode(text: &str, (rows, columns): (usize, usize)) -> Option<Array2<f64>> {
    let digit = |letter: u8| ALPHABET.iter().position(|&known| known == letter);
    let number = |letters: &[u8]| Some(digit(*letters.first()?)? * 64 + digit(*letters.get(1)?)?);
    let mut shares = Vec::with_capacity(rows.checked_mul(columns)?);
    let mut rest = text.as_bytes();
    while let Some(&first) = rest.first() {
        if first == RUN as u8 {
            let zeros = number(rest.get(1..3)?)?;
            shares.resize(shares.len() + zeros, 0.0);
            rest = &rest[3..];
        } else {
            let root = number(rest.get(..2)?)? as f64 / MOST as f64;
            shares.push(root * root);
            rest = &rest[2..];
        }
    }
    Array2::from_shape_vec((rows, columns), shares).ok()
}

/// Codes below 64, one letter each; none if a code is larger.
pub(super) fn letters(codes: &[u8]) -> Option<String> {
    let letter = |&code: &u8| {
        ALPHABET
            .get(usize::from(code))
            .map(|&letter| letter as char)
    };
    codes.iter().map(letter).collect()
}

fn push(text: &mut String, number: usize) {
    text.extend([number / 64, number % 64].map(|digit| ALPHABET[digit] as char));
}

fn push_zeros(text: &mut String, mut zeros: usize) {
    while zeros > 0 {
        let run = zeros.min(MOST);
        text.push(RUN);
        push(text, run);
        zeros -= run;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn maps_come_back_as_exactly_as_they_are_written(
            rows in 0_usize..20,
            columns in 1_usize..20,
            values in prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..1e-3, 0.0..1.0], 400),
            floor in prop_oneof![Just(0.0), Just(1e-3)],
        ) {
            let map = Array2::from_shape_fn((rows, columns), |(r, c)| values[r * 20 + c]);
            let read = decode(&encode(map.view(), floor), (rows, columns)).unwrap();
            for (&read, &share) in read.iter().zip(&map) {
                let wanted = if share < floor { 0.0 } else { share };
                // Half a unit in the root, at most.
                let error = (read.sqrt() - wanted.sqrt()).abs();
                prop_assert!(error <= 0.5001 / MOST as f64, "{share} came back as {read}");
            }
        }
    }

    #[test]
    fn long_runs_of_zeros_are_short_and_come_back() {
        let mut map = Array2::zeros((200, 100));
        map[[199, 99]] = 1.0;
        let text = encode(map.view(), 0.0);
        assert!(text.len() < 20, "{text}");
        assert_eq!(decode(&text, (200, 100)), Some(map));
    }

    #[test]
    fn the_floor_rises_until_the_maps_fit() {
        let map = Array2::from_elem((100, 100), 5e-4);
        assert_eq!(encode_all(&[map.view()], 20_000).1, 0.0);
        let (texts, floor) = encode_all(&[map.view()], 19_999);
        assert_eq!((floor, texts[0].len()), (1e-3, 9));
    }

    #[test]
    fn text_that_is_no_map_is_refused() {
        for text in ["A", "~A", "A*", "AAAA"] {
            assert_eq!(decode(text, (1, 1)), None, "{text}");
        }
    }
}
