//! Edges of histograms, and the keys at which a value passes from one bin to the next.

use serde::Serialize;

use super::element::Format;
use crate::error::{Error, Result};

/// How a histogram's range is divided.
#[derive(Debug, Clone, PartialEq)]
pub enum Bins {
    /// So many bins of one width from the least to the greatest finite value.
    Automatic(usize),
    /// Between these edges, ascending; values outside are not counted.
    Edges(Vec<f64>),
}

impl Bins {
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Automatic(0) => Err(Error::Argument("a histogram needs at least one bin".into())),
            Self::Automatic(_) => Ok(()),
            Self::Edges(edges) if edges.len() < 2 => {
                Err(Error::Argument("a histogram needs at least two edges".into()))
            }
            Self::Edges(edges) => {
                if edges.iter().any(|edge| edge.is_nan())
                    || edges.windows(2).any(|pair| pair[0] > pair[1])
                {
                    return Err(Error::Argument(
                        "the edges of a histogram must be numbers in ascending order".into(),
                    ));
                }
                Ok(())
            }
        }
    }

    /// The edges for values from `low` to `high`, as `numpy.histogram_bin_edges` has them:
    /// 0 to 1 for no values, half a unit to either side of a single one.
    pub(crate) fn edges(&self, low: f64, high: f64) -> Vec<f64> {
        match self {
            Self::Edges(edges) => edges.clone(),
            Self::Automatic(bins) => automatic_edges(*bins, low, high),
        }
    }
}

fn automatic_edges(bins: usize, low: f64, high: f64) -> Vec<f64> {
    let (low, high) = if low > high {
        (0.0, 1.0)
    } else if low == high {
        (low - 0.5, high + 0.5)
    } else {
        (low, high)
    };
    let step = (high - low) / bins as f64;
    let mut edges: Vec<f64> = (0..=bins).map(|i| i as f64 * step + low).collect();
    edges[bins] = high;
    edges
}

/// Counts of values between edges. A bin holds its left edge; the last holds both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// The n+1 edges of the n bins, ascending.
    pub edges: Vec<f64>,
    /// The number of values in each bin.
    pub counts: Vec<u64>,
}

/// Keys to either side of a guess that are searched before all are.
const NEAR: u64 = 8;

/// The offset under the logarithm that keeps zeros in the picture.
pub(crate) const LOG_OFFSET: f64 = 1e-8;

/// log₁₀(|x| + 1e-8), what the logarithmic histogram is drawn over.
pub(crate) fn log_magnitude(value: f64) -> f64 {
    (value.abs() + LOG_OFFSET).log10()
}

/// The keys that `counts` needs the numbers of smaller values for.
pub(super) fn linear_thresholds(format: Format, edges: &[f64]) -> Vec<u64> {
    let last = edges.len() - 1;
    let search = |predicate: &dyn Fn(f64) -> bool| {
        format.first(format.least(), format.infinity(), predicate)
    };
    edges
        .iter()
        .enumerate()
        .map(
            |(i, &edge)| {
                if i == last {
                    search(&|value| value > edge)
                } else {
                    search(&|value| value >= edge)
                }
            },
        )
        .collect()
}

/// Counts in the bins from the number of values below each of `linear_thresholds`. Those ascend,
/// unless somebody wrote to the file between two looks, which is found at the end.
pub(super) fn linear_counts(below: &[u64]) -> Vec<u64> {
    below.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect()
}

/// For each edge two keys, one on either side of zero, between which the values lie whose
/// logarithmic magnitude is below the edge.
pub(super) fn log_thresholds(format: Format, edges: &[f64]) -> Vec<u64> {
    let last = edges.len() - 1;
    let (zero, infinity) = (format.zero(), format.infinity());
    let search = |edge: f64, predicate: &dyn Fn(f64) -> bool| {
        // The logarithm is dear: look for the key next to where it must be first.
        let guess = format.key((10f64.powf(edge) - LOG_OFFSET).max(0.0));
        let (low, high) = (guess.saturating_sub(NEAR).max(zero), guess + NEAR);
        if low > zero && high < infinity && !predicate(format.value(low - 1)) {
            let found = format.first(low, high, predicate);
            if found < high {
                return found;
            }
        }
        format.first(zero, infinity, predicate)
    };
    edges
        .iter()
        .enumerate()
        .flat_map(|(i, &edge)| {
            let upper = if i == last {
                search(edge, &|value| log_magnitude(value) > edge)
            } else {
                search(edge, &|value| log_magnitude(value) >= edge)
            };
            [format.negate(upper) + 1, upper]
        })
        .collect()
}

/// Counts in the bins from the number of values below each of `log_thresholds`.
pub(super) fn log_counts(below: &[u64]) -> Vec<u64> {
    let inside = below.chunks_exact(2);
    let inside: Vec<u64> = inside.map(|pair| pair[1].saturating_sub(pair[0])).collect();
    linear_counts(&inside)
}
