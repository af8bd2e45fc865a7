//! Exact ranks without a sort: counts by the upper bits of order-preserving keys, then a
//! second look at those few buckets in which an answer lies.
//!
//! Two questions are answered of a population: which value stands at a rank (percentiles), and
//! how many values lie below a key (histograms). Counts are integers, so partial results of any
//! decomposition merge to the same answer.

use super::element::{BLOCK, Format, Tensor};

/// Buckets of a 16-bit digit.
const DIGITS: usize = 1 << 16;

/// Bits of the first digit of large populations, and of those with at most [`SMALL`] values, to
/// which a table of 2¹⁶ counts would be more work than the values. Either digit holds the whole
/// exponent of every format, so that infinities and NaN have buckets of their own.
const LARGE_DIGIT: u32 = 16;
const SMALL_DIGIT: u32 = 12;

/// See [`SMALL_DIGIT`]. Not above [`KEEP`], so that second digits are never counted there.
const SMALL: u64 = 1 << 14;

/// Buckets that one coarse count covers.
const COARSE: usize = 256;

/// A bucket with no more candidates than this keeps them; a fuller one counts its next digit.
const KEEP: u64 = 1 << 15;

/// How many values fall in each bucket of the keys' upper bits.
pub(crate) struct Counts {
    format: Format,
    /// Bits of a key below the first digit.
    shift: u32,
    table: Vec<u64>,
}

impl Counts {
    /// No values yet, of a population of about `size`.
    pub(crate) fn new(format: Format, size: u64) -> Self {
        let digit = if size <= SMALL { SMALL_DIGIT } else { LARGE_DIGIT };
        Self { format, shift: format.width() - digit, table: vec![0; 1 << digit] }
    }

    /// Whether counts of the one can be added to the other.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.format == other.format && self.shift == other.shift
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Counts a tensor's values in.
    pub(crate) fn add(&mut self, tensor: &Tensor<'_>) {
        let excess = self.shift + 16 - self.format.width();
        let table = &mut self.table;
        let mut buffer = [0u16; BLOCK];
        let mut start = 0;
        while start < tensor.len() {
            let end = tensor.len().min(start + BLOCK);
            let buckets = &mut buffer[..end - start];
            tensor.slice(start, end).buckets(self.format, buckets);
            // With arrays of a known size no index has to be checked.
            if let Ok(table) = <&mut [u64; DIGITS]>::try_from(table.as_mut_slice()) {
                for &bucket in buckets.iter() {
                    table[usize::from(bucket)] += 1;
                }
            } else {
                for &bucket in buckets.iter() {
                    table[usize::from(bucket >> excess)] += 1;
                }
            }
            start = end;
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        debug_assert!(self.is_like(other));
        for (own, theirs) in self.table.iter_mut().zip(&other.table) {
            *own += theirs;
        }
    }

    /// Drops NaN and infinities and prepares the rank queries.
    pub(crate) fn index(mut self) -> Index {
        let shift = self.shift;
        // The infinities share their buckets with NaN alone.
        let first = (self.format.least() >> shift) as usize;
        let end = (self.format.infinity() >> shift) as usize;
        self.table[..first].fill(0);
        self.table[end..].fill(0);
        let mut coarse = Vec::with_capacity(self.table.len() / COARSE + 1);
        let mut total = 0;
        for group in self.table.chunks_exact(COARSE) {
            coarse.push(total);
            total += group.iter().sum::<u64>();
        }
        coarse.push(total);
        Index { format: self.format, shift, table: self.table, coarse }
    }
}

/// The first-level counts of finite values, with their running totals.
pub(crate) struct Index {
    format: Format,
    shift: u32,
    table: Vec<u64>,
    coarse: Vec<u64>,
}

impl Index {
    pub(crate) fn total(&self) -> u64 {
        self.coarse[self.table.len() / COARSE]
    }

    /// Values in the buckets before this one.
    fn before(&self, bucket: usize) -> u64 {
        let group = bucket / COARSE;
        self.coarse[group] + self.table[group * COARSE..bucket].iter().sum::<u64>()
    }

    /// The bucket of the value at `rank`, and its rank within the bucket.
    fn locate(&self, rank: u64) -> (usize, u64) {
        let group = self.coarse.partition_point(|&before| before <= rank) - 1;
        let mut rest = rank - self.coarse[group];
        let mut bucket = group * COARSE;
        while rest >= self.table[bucket] {
            rest -= self.table[bucket];
            bucket += 1;
        }
        (bucket, rest)
    }

    /// What has to be looked at again to know the values at `ranks` (each below the total) and
    /// the number of values below each of `thresholds`.
    pub(crate) fn refine(&self, ranks: &[u64], thresholds: &[u64]) -> Refinement {
        let shift = self.shift;
        let mut refinement = Refinement {
            format: self.format,
            shift,
            map: Vec::new(),
            slots: Vec::new(),
            thresholds: Vec::new(),
            selections: Vec::new(),
        };
        for &threshold in thresholds {
            let bucket = (threshold >> shift) as usize;
            let inside = threshold & ((1 << shift) - 1) != 0 && self.table[bucket] > 0;
            let slot = inside.then(|| {
                let slot = refinement.slot(bucket);
                refinement.slots[slot].thresholds.push(threshold);
                slot
            });
            refinement.thresholds.push(Threshold {
                key: threshold,
                before: self.before(bucket),
                slot,
            });
        }
        for slot in &mut refinement.slots {
            slot.thresholds.sort_unstable();
            slot.thresholds.dedup();
        }
        for &rank in ranks {
            let (bucket, rest) = self.locate(rank);
            let selection =
                Selection { prefix: bucket as u64, shift, rest, count: self.table[bucket] };
            refinement.selections.push(selection);
        }
        refinement.mark();
        refinement
    }
}

/// A threshold: how many values lie below the key.
struct Threshold {
    key: u64,
    /// Values in earlier buckets.
    before: u64,
    /// Where its own bucket is counted, if that is needed.
    slot: Option<usize>,
}

/// The search for the value at one rank: it is known that its key starts with `prefix`.
#[derive(Debug, Clone, Copy)]
struct Selection {
    prefix: u64,
    /// Bits of the key that are not known yet.
    shift: u32,
    /// The rank among the values with this prefix.
    rest: u64,
    /// Values with this prefix.
    count: u64,
}

/// A bucket that is looked at again.
#[derive(Default)]
struct Slot {
    /// Keys to count below, ascending.
    thresholds: Vec<u64>,
    /// The stores that the bucket's keys may belong to.
    stores: std::ops::Range<usize>,
}

/// The questions of a second look.
pub(crate) struct Refinement {
    format: Format,
    /// Bits of a key below the first digit.
    shift: u32,
    /// For every bucket 0, or the number of its slot plus one. Empty when there is no question.
    map: Vec<u16>,
    slots: Vec<Slot>,
    thresholds: Vec<Threshold>,
    selections: Vec<Selection>,
}

/// The answers of a second look, mergeable.
pub(crate) struct Tally {
    /// For each slot, the values before its first threshold, between that and the second, ….
    counters: Vec<Vec<u64>>,
    stores: Vec<Store>,
}

/// What is kept of the values that share a prefix.
struct Store {
    prefix: u64,
    shift: u32,
    content: Content,
}

enum Content {
    Keys(Vec<u64>),
    NextDigit(Vec<u64>),
}

impl Refinement {
    fn slot(&mut self, bucket: usize) -> usize {
        if self.map.is_empty() {
            self.map = vec![0; 1 << (self.format.width() - self.shift)];
        }
        if self.map[bucket] == 0 {
            self.slots.push(Slot::default());
            self.map[bucket] = u16::try_from(self.slots.len()).expect("finite buckets are fewer");
        }
        usize::from(self.map[bucket]) - 1
    }

    /// The unfinished prefixes, each once, ascending.
    fn prefixes(&self) -> Vec<(u64, u32, u64)> {
        let mut prefixes: Vec<_> = self
            .selections
            .iter()
            .filter(|selection| selection.shift > 0)
            .map(|selection| (selection.prefix, selection.shift, selection.count))
            .collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes
    }

    /// Gives every unfinished prefix its slot.
    fn mark(&mut self) {
        for (store, (prefix, shift, _)) in self.prefixes().into_iter().enumerate() {
            let slot = self.slot((prefix >> (self.shift - shift)) as usize);
            let stores = &mut self.slots[slot].stores;
            if stores.start == stores.end {
                *stores = store..store;
            }
            // Prefixes ascend and all have the same length, so those of one bucket are adjacent.
            stores.end = store + 1;
        }
    }

    /// Whether the population has to be looked at (again).
    pub(crate) fn is_needed(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Empty answers.
    pub(crate) fn tally(&self) -> Tally {
        Tally {
            counters: self.slots.iter().map(|slot| vec![0; slot.thresholds.len() + 1]).collect(),
            stores: self
                .prefixes()
                .into_iter()
                .map(|(prefix, shift, count)| Store {
                    prefix,
                    shift,
                    content: if count <= KEEP {
                        Content::Keys(Vec::new())
                    } else {
                        Content::NextDigit(vec![0; DIGITS])
                    },
                })
                .collect(),
        }
    }

    /// Looks at a tensor's values.
    pub(crate) fn visit(&self, tensor: &Tensor<'_>, tally: &mut Tally) {
        let (map, shift) = (self.map.as_slice(), self.shift);
        let mut buffer = [0u64; BLOCK];
        let mut start = 0;
        while start < tensor.len() {
            let end = tensor.len().min(start + BLOCK);
            let keys = &mut buffer[..end - start];
            tensor.slice(start, end).keys(self.format, keys);
            // Most keys lie in no marked bucket: pack the others together without branches.
            let mut kept = 0;
            for index in 0..keys.len() {
                let key = keys[index];
                keys[kept] = key;
                kept += usize::from(map[(key >> shift) as usize] != 0);
            }
            for &key in &keys[..kept] {
                let number = usize::from(map[(key >> shift) as usize]) - 1;
                let slot = &self.slots[number];
                if !slot.thresholds.is_empty() {
                    let below = slot.thresholds.partition_point(|&threshold| threshold <= key);
                    tally.counters[number][below] += 1;
                }
                for store in &mut tally.stores[slot.stores.clone()] {
                    store.add(key);
                }
            }
            start = end;
        }
    }

    /// The number of values below each threshold, in the order they were asked for.
    pub(crate) fn below(&self, tally: &Tally) -> Vec<u64> {
        self.thresholds
            .iter()
            .map(|threshold| {
                let inside = threshold.slot.map_or(0, |number| {
                    let slot = &self.slots[number];
                    let position = slot.thresholds.partition_point(|&key| key < threshold.key);
                    tally.counters[number][..=position].iter().sum()
                });
                threshold.before + inside
            })
            .collect()
    }

    /// Narrows every selection by what was found, and asks what is still open. `None` if fewer values
    /// were found than were counted before.
    pub(crate) fn narrow(self, mut tally: Tally) -> Option<Self> {
        let mut selections = self.selections;
        for selection in selections.iter_mut().filter(|selection| selection.shift > 0) {
            let store = tally
                .stores
                .iter_mut()
                .find(|store| store.prefix == selection.prefix)
                .expect("every open prefix has a store");
            store.narrow(selection)?;
        }
        let mut next = Self {
            format: self.format,
            shift: self.shift,
            map: Vec::new(),
            slots: Vec::new(),
            thresholds: Vec::new(),
            selections,
        };
        next.mark();
        Some(next)
    }

    /// The values at the ranks, in the order they were asked for, once nothing is open.
    pub(crate) fn values(&self) -> Vec<f64> {
        debug_assert!(!self.is_needed());
        self.selections.iter().map(|selection| self.format.value(selection.prefix)).collect()
    }
}

impl Tally {
    pub(crate) fn merge(&mut self, other: Self) {
        for (own, theirs) in self.counters.iter_mut().zip(other.counters) {
            for (own, theirs) in own.iter_mut().zip(theirs) {
                *own += theirs;
            }
        }
        for (own, theirs) in self.stores.iter_mut().zip(other.stores) {
            match (&mut own.content, theirs.content) {
                (Content::Keys(own), Content::Keys(theirs)) => own.extend(theirs),
                (Content::NextDigit(own), Content::NextDigit(theirs)) => {
                    for (own, theirs) in own.iter_mut().zip(theirs) {
                        *own += theirs;
                    }
                }
                _ => unreachable!("both were made by one refinement"),
            }
        }
    }
}

impl Store {
    fn add(&mut self, key: u64) {
        if key >> self.shift != self.prefix {
            return;
        }
        match &mut self.content {
            Content::Keys(keys) => keys.push(key),
            Content::NextDigit(table) => table[(key >> (self.shift - 16)) as u16 as usize] += 1,
        }
    }

    fn narrow(&mut self, selection: &mut Selection) -> Option<()> {
        match &mut self.content {
            Content::Keys(keys) => {
                if selection.rest >= keys.len() as u64 {
                    return None;
                }
                let (_, key, _) = keys.select_nth_unstable(selection.rest as usize);
                selection.prefix = *key;
                selection.shift = 0;
            }
            Content::NextDigit(table) => {
                let mut digit = 0;
                while selection.rest >= *table.get(digit)? {
                    selection.rest -= table[digit];
                    digit += 1;
                }
                selection.prefix = selection.prefix << 16 | digit as u64;
                selection.shift -= 16;
                selection.count = table[digit];
            }
        }
        Some(())
    }
}
