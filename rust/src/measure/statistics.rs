//! Statistics of stored tensors: moments, exact percentiles, histograms.
//!
//! All figures are of the finite values; NaN and infinities are counted and left out. Values are
//! widened to f64 exactly (64-bit integers are rounded). Sums are in f64 over fixed blocks that
//! are combined in a fixed order, so that every figure has the same bits whatever the number of
//! threads. Percentiles and histograms are exact: they come from counting order-preserving keys,
//! never from a sample or a fitted curve.
//!
//! Work is spread over the rayon pool that the caller has installed.

mod element;
mod halves;
mod histogram;
mod moments;
pub(crate) mod panels;
mod radix;
mod source;

#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;
use serde::Serialize;

pub use element::{ElementType, Tensor};
pub use histogram::{Bins, Histogram};
pub use source::Source;

pub(crate) use histogram::log_magnitude;
pub(crate) use moments::Moments;
pub(crate) use source::{InFile, with_room};

use crate::error::{Error, Result};
use crate::parallel::task::Task;
use element::Format;
use histogram::{linear_counts, linear_thresholds, log_counts, log_thresholds};
use radix::{Counts, Refinement, Tally};

/// Elements of one unit of work.
pub(crate) const SEGMENT: usize = 1 << 16;

/// Units of work that a thread takes at a time, so that its tables of counts are worth their
/// setting up.
const SEGMENTS_AT_A_TIME: usize = 8;

/// What to find beside the moments.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Request {
    /// Percentiles, each from 0 to 100.
    pub percentiles: Vec<f64>,
    /// A histogram of the values.
    pub histogram: Option<Bins>,
    /// A histogram of log₁₀(|x| + 1e-8).
    pub log_histogram: Option<Bins>,
}

impl Request {
    fn check(&self) -> Result<()> {
        for &percentile in &self.percentiles {
            if !(0.0..=100.0).contains(&percentile) {
                return Err(Error::Argument(format!(
                    "percentile {percentile} is not between 0 and 100"
                )));
            }
        }
        for bins in [&self.histogram, &self.log_histogram].into_iter().flatten() {
            bins.check()?;
        }
        Ok(())
    }

    fn needs_counts(&self) -> bool {
        !self.percentiles.is_empty() || self.histogram.is_some() || self.log_histogram.is_some()
    }
}

/// The statistics of one population of values. Of finite values alone, but for the two counts.
/// Means, extremes and percentiles of an empty population are NaN.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// All values, finite or not.
    pub count: u64,
    /// NaN and ±∞ among them; all other figures leave these out.
    pub non_finite: u64,
    /// Values equal to zero.
    pub zeros: u64,
    /// The zeros' share of the finite values; NaN of an empty population.
    pub zero_share: f64,
    /// The arithmetic mean.
    pub mean: f64,
    /// The population standard deviation (divisor n), as `numpy.std`.
    pub std: f64,
    /// The least value.
    pub min: f64,
    /// The greatest value.
    pub max: f64,
    /// Σ|x|.
    pub l1_norm: f64,
    /// √Σx².
    pub l2_norm: f64,
    /// max|x|; 0 of an empty population.
    pub max_norm: f64,
    /// m₃/m₂^1.5 of the biased central moments, as `scipy.stats.skew`; NaN of equal values.
    pub skewness: f64,
    /// Fisher's excess m₄/m₂² − 3, biased, as `scipy.stats.kurtosis`; NaN of equal values.
    pub kurtosis: f64,
    /// The requested percentiles, by linear interpolation as `numpy.percentile` in f64.
    pub percentiles: Vec<f64>,
    /// The histogram of the values, if requested; equal to `numpy.histogram` in f64.
    pub histogram: Option<Histogram>,
    /// The histogram of log₁₀(|x| + 1e-8), if requested.
    pub log_histogram: Option<Histogram>,
}

/// The statistics of all elements of `tensors`, taken together as one population.
///
/// # Errors
/// [`Error::Argument`] for a percentile outside 0 to 100 or unusable bins, and those of reading.
pub fn describe<S: Source>(tensors: &[S], request: &Request) -> Result<Summary> {
    request.check()?;
    let (moments, counts) = first_look(tensors, common_format(tensors), request.needs_counts())?;
    summarize(tensors, request, &moments, counts)
}

/// What was found of a run of tensors: of each, its summary and its moments; of all, the counts.
type Found = (Vec<Summary>, Vec<Moments>, Option<Counts>);

/// The statistics of each tensor for itself, and of all of them together: the same figures as of
/// [`describe`], with less reading. Progress is counted in bytes.
///
/// # Errors
/// [`Error::Argument`] for a percentile outside 0 to 100 or unusable bins, [`Error::Cancelled`], and
/// those of reading.
pub fn describe_each<S: Source>(
    tensors: &[S],
    request: &Request,
    task: &Task,
) -> Result<(Vec<Summary>, Summary)> {
    request.check()?;
    let format = common_format(tensors);
    let size = total_len(tensors);
    let needs_counts = request.needs_counts();
    let empty = || -> Found { (Vec::new(), Vec::new(), None) };
    let (summaries, all_moments, counts) = tensors
        .par_iter()
        .try_fold(empty, |(mut summaries, mut all_moments, mut all_counts), tensor| {
            task.check()?;
            let all =
                needs_counts.then(|| all_counts.get_or_insert_with(|| Counts::new(format, size)));
            let (summary, moments) = with_room(|room| match tensor.read_whole(room)? {
                Some(whole) => describe_one(&whole, request, all),
                None => describe_one(tensor, request, all),
            })?;
            summaries.push(summary);
            all_moments.push(moments);
            task.advance((tensor.len() * tensor.element().size()) as u64);
            Ok((summaries, all_moments, all_counts))
        })
        .try_reduce(empty, |mut left: Found, right| {
            left.0.extend(right.0);
            left.1.extend(right.1);
            Ok((left.0, left.1, merge_counts(left.2, right.2)))
        })?;
    let moments = merge_in_order(&all_moments);
    let counts = needs_counts.then(|| counts.unwrap_or_else(|| Counts::new(format, size)));
    let all = summarize(tensors, request, &moments, counts)?;
    Ok((summaries, all))
}

/// The statistics of one tensor, whose values are counted among those of all.
fn describe_one<S: Source>(
    tensor: &S,
    request: &Request,
    all: Option<&mut Counts>,
) -> Result<(Summary, Moments)> {
    let one = std::slice::from_ref(tensor);
    let (moments, counts) = first_look(one, tensor.element().format(), all.is_some())?;
    if let (Some(all), Some(own)) = (all, &counts) {
        if all.is_like(own) {
            all.merge(own);
        } else {
            for part in segments(one) {
                part.look(|part| all.add(part))?;
            }
        }
    }
    Ok((summarize(one, request, &moments, counts)?, moments))
}

fn total_len<S: Source>(tensors: &[S]) -> u64 {
    tensors.iter().map(|tensor| tensor.len() as u64).sum()
}

fn common_format<S: Source>(tensors: &[S]) -> Format {
    tensors
        .iter()
        .map(|tensor| tensor.element().format())
        .reduce(Format::join)
        .unwrap_or(Format::Single)
}

/// A unit of work: elements of a tensor.
struct Segment<'a, S> {
    tensor: &'a S,
    elements: Range<usize>,
}

impl<S: Source> Segment<'_, S> {
    /// What somebody makes of its elements.
    fn look<T>(&self, make: impl FnOnce(&Tensor<'_>) -> T) -> Result<T> {
        with_room(|room| Ok(make(&self.tensor.read(self.elements.clone(), room)?)))
    }
}

/// The tensors cut into units of work.
fn segments<S: Source>(tensors: &[S]) -> Vec<Segment<'_, S>> {
    tensors
        .iter()
        .flat_map(|tensor| {
            let length = tensor.len();
            (0..length)
                .step_by(SEGMENT)
                .map(move |start| Segment { tensor, elements: start..length.min(start + SEGMENT) })
        })
        .collect()
}

fn merge_counts(left: Option<Counts>, right: Option<Counts>) -> Option<Counts> {
    match (left, right) {
        (Some(mut left), Some(right)) => {
            left.merge(&right);
            Some(left)
        }
        (left, right) => left.or(right),
    }
}

fn merge_in_order(parts: &[Moments]) -> Moments {
    let mut moments = Moments::default();
    for part in parts {
        moments.merge(part);
    }
    moments
}

/// The moments of each segment of a tensor, found by the calling thread alone.
pub(crate) fn segment_moments(tensor: &Tensor<'_>) -> Vec<Moments> {
    let starts = (0..tensor.len()).step_by(SEGMENT);
    let part = |start: usize| tensor.slice(start, tensor.len().min(start + SEGMENT));
    starts.map(|start| Moments::of(&part(start))).collect()
}

/// What follows from moments alone, bit for bit as [`describe`] finds it: of one tensor from those
/// of its segments, of several from those of each.
pub(crate) fn summary_of(parts: &[Moments]) -> (Moments, Summary) {
    let moments = merge_in_order(parts);
    let summary = summary(&moments, Distribution::default());
    (moments, summary)
}

/// Moments and first-level counts in one pass. The moments of a tensor are merged to one before
/// those of several tensors are, so that [`describe`] and [`describe_each`] agree in every bit.
fn first_look<S: Source>(
    tensors: &[S],
    format: Format,
    needs_counts: bool,
) -> Result<(Moments, Option<Counts>)> {
    let size = total_len(tensors);
    let work = segments(tensors);
    type Seen = (Vec<Moments>, Option<Counts>);
    let visit = |(mut moments, mut counts): Seen, part: &Segment<'_, S>| {
        part.look(|part| {
            moments.push(Moments::of(part));
            if needs_counts {
                counts.get_or_insert_with(|| Counts::new(format, size)).add(part);
            }
        })?;
        Ok((moments, counts))
    };
    let empty = || -> Seen { (Vec::new(), None) };
    let (parts, counts) = if work.len() <= 1 {
        work.iter().try_fold(empty(), visit)?
    } else {
        work.par_iter().with_min_len(SEGMENTS_AT_A_TIME).try_fold(empty, visit).try_reduce(
            empty,
            |mut left, right| {
                left.0.extend(right.0);
                Ok::<_, Error>((left.0, merge_counts(left.1, right.1)))
            },
        )?
    };
    let mut rest = parts.as_slice();
    let mut of_tensors = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let (own, others) = rest.split_at(tensor.len().div_ceil(SEGMENT));
        of_tensors.push(merge_in_order(own));
        rest = others;
    }
    let counts = needs_counts.then(|| counts.unwrap_or_else(|| Counts::new(format, size)));
    Ok((merge_in_order(&of_tensors), counts))
}

/// A rank that percentiles are interpolated at: the one below, and the share of the one above.
struct Position {
    below: u64,
    above: u64,
    share: f64,
}

impl Position {
    /// The virtual index q·(n−1) of NumPy's default method.
    fn of(percentile: f64, count: u64) -> Self {
        let last = count - 1;
        let index = last as f64 * (percentile / 100.0);
        let below = (index.floor() as u64).min(last);
        Self { below, above: (below + 1).min(last), share: index - below as f64 }
    }

    /// NumPy's `_lerp`, which is monotone and exact at both ends.
    fn interpolate(&self, below: f64, above: f64) -> f64 {
        let difference = above - below;
        if self.share >= 0.5 {
            above - difference * (1.0 - self.share)
        } else {
            below + difference * self.share
        }
    }
}

fn summarize<S: Source>(
    tensors: &[S],
    request: &Request,
    moments: &Moments,
    counts: Option<Counts>,
) -> Result<Summary> {
    let distribution =
        counts.map(|counts| Distribution::find(tensors, request, moments, counts)).transpose()?;
    Ok(summary(moments, distribution.unwrap_or_default()))
}

fn summary(moments: &Moments, distribution: Distribution) -> Summary {
    let finite = moments.finite;
    let or_nan = |value: f64| if finite == 0 { f64::NAN } else { value };
    Summary {
        count: finite + moments.non_finite,
        non_finite: moments.non_finite,
        zeros: moments.zeros,
        zero_share: moments.zeros as f64 / finite as f64,
        mean: moments.mean(),
        std: moments.variance().sqrt(),
        min: or_nan(moments.min),
        max: or_nan(moments.max),
        l1_norm: moments.absolute_sum(),
        l2_norm: moments.euclidean_norm(),
        max_norm: if finite == 0 { 0.0 } else { moments.min.abs().max(moments.max.abs()) },
        skewness: moments.skewness(),
        kurtosis: moments.kurtosis(),
        percentiles: distribution.percentiles,
        histogram: distribution.histogram,
        log_histogram: distribution.log_histogram,
    }
}

#[derive(Default)]
struct Distribution {
    percentiles: Vec<f64>,
    histogram: Option<Histogram>,
    log_histogram: Option<Histogram>,
}

impl Distribution {
    fn find<S: Source>(
        tensors: &[S],
        request: &Request,
        moments: &Moments,
        counts: Counts,
    ) -> Result<Self> {
        let format = counts.format();
        let index = counts.index();
        debug_assert_eq!(index.total(), moments.finite);
        let edges = request.histogram.as_ref().map(|bins| bins.edges(moments.min, moments.max));
        let log_edges = request.log_histogram.as_ref().map(|bins| {
            let (low, high) = if moments.finite == 0 {
                (1.0, 0.0)
            } else {
                let greatest = moments.min.abs().max(moments.max.abs());
                (log_magnitude(moments.least), log_magnitude(greatest))
            };
            bins.edges(low, high)
        });
        let mut thresholds = Vec::new();
        if let Some(edges) = &edges {
            thresholds.extend(linear_thresholds(format, edges));
        }
        let linear = thresholds.len();
        if let Some(edges) = &log_edges {
            thresholds.extend(log_thresholds(format, edges));
        }
        let positions: Vec<Position> = if moments.finite == 0 {
            Vec::new()
        } else {
            let place = |&percentile| Position::of(percentile, moments.finite);
            request.percentiles.iter().map(place).collect()
        };
        let ranks: Vec<u64> =
            positions.iter().flat_map(|position| [position.below, position.above]).collect();

        let refinement = index.refine(&ranks, &thresholds);
        drop(index);
        // What was counted is not there any more where somebody wrote to the file in between.
        let changed = || match tensors.first() {
            Some(tensor) => tensor.changed(),
            None => unreachable!("nothing is looked for among no values"),
        };
        let tally = look_again(tensors, &refinement)?;
        let below = refinement.below(&tally);
        let mut refinement = refinement.narrow(tally).ok_or_else(changed)?;
        while refinement.is_needed() {
            let tally = look_again(tensors, &refinement)?;
            refinement = refinement.narrow(tally).ok_or_else(changed)?;
        }
        let percentiles = if moments.finite == 0 {
            vec![f64::NAN; request.percentiles.len()]
        } else {
            positions
                .iter()
                .zip(refinement.values().chunks_exact(2))
                .map(|(position, pair)| position.interpolate(pair[0], pair[1]))
                .collect()
        };
        Ok(Self {
            percentiles,
            histogram: edges
                .map(|edges| Histogram { edges, counts: linear_counts(&below[..linear]) }),
            log_histogram: log_edges
                .map(|edges| Histogram { edges, counts: log_counts(&below[linear..]) }),
        })
    }
}

fn look_again<S: Source>(tensors: &[S], refinement: &Refinement) -> Result<Tally> {
    if !refinement.is_needed() {
        return Ok(refinement.tally());
    }
    let visit = |mut tally: Tally, part: &Segment<'_, S>| {
        part.look(|part| refinement.visit(part, &mut tally))?;
        Ok(tally)
    };
    let work = segments(tensors);
    if work.len() <= 1 {
        return work.iter().try_fold(refinement.tally(), visit);
    }
    let tally = work
        .par_iter()
        .with_min_len(SEGMENTS_AT_A_TIME)
        .try_fold(|| refinement.tally(), visit)
        .try_reduce_with(|mut left, right| {
            left.merge(right);
            Ok(left)
        });
    tally.unwrap_or_else(|| Ok(refinement.tally()))
}
