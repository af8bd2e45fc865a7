//! One row of a merged tensor in f64, with a bound on what a correct f32 merge may differ by.

use std::ops::Range;

use crate::error::Result;
use crate::execute::compute::Computer;
use crate::execute::entries::MergedRow;
use crate::execute::queue;
use crate::execute::tile::Prepared;
use crate::kernel::PRODUCT_ERROR;
use crate::kernel::convert::widen_f64;
use crate::plan::{Action, PlannedTensor, Update, UpdateKind};
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;

use super::{Arithmetic, Change, transforms};

/// How often PEFT's merge rounds what one adapter adds at most, beyond the last time: its product,
/// the scaled product, and a sum before the last one (in attention's projections).
pub(crate) const PEFT_ROUNDINGS: usize = 3;

/// What is allowed beside the roundings of a merge in f32.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tolerance {
    /// PEFT's further roundings.
    pub peft: bool,
    /// What the arithmetic of products changes.
    pub arithmetic: Arithmetic,
}

/// Computes rows of one tensor exactly, as far as f64 is exact.
pub(super) struct ExactRow<'a> {
    computer: Computer<'a>,
    planned: &'a PlannedTensor,
    /// The products as they were merged, where an entry-wise method decides by their values.
    prepared: &'a Prepared,
    columns: usize,
    /// Rows of W₀ that were just read, as they are stored.
    tile: (Range<usize>, Vec<u8>),
    terms: Vec<Term>,
    /// Whether PEFT's further roundings are allowed.
    peft: bool,
    /// What splitting the factors of a product may change, as a share of its size; and how many
    /// products that makes of one.
    split: (f64, f64),
    /// What PEFT's decomposition of the base in f32 may be off, in any element.
    decomposition: f64,
}

/// One update, its factors widened.
struct Term {
    adapter: usize,
    kind: UpdateKind,
    stage: usize,
    weight: f64,
    scale: f64,
    rank: usize,
    transposed: bool,
    /// The rows on which it lies.
    row_range: Range<usize>,
    a: Vec<f64>,
    b: Vec<f64>,
    /// DoRA's scale m/‖V‖ of each column, where the norms run over rows.
    column_scales: Vec<f64>,
    magnitude: Vec<f64>,
    /// The adapter's tensor that it is made from, where that is not W₀.
    base_override: Option<Vec<f64>>,
    /// The product that the initialisation took out of W₀.
    removed: Option<Removed>,
}

struct Removed {
    scale: f64,
    rank: usize,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Term {
    /// An element of s·B·A as it lies on the stored weight, and the sum of the sizes of its terms.
    fn product(&self, row: usize, column: usize, columns: usize) -> (f64, f64) {
        let (row, rows) = (row - self.row_range.start, self.row_range.len());
        let product = |a: &[f64], b: &[f64], rank: usize, scale: f64| {
            let mut sum = 0.0;
            let mut size = 0.0;
            for k in 0..rank {
                let term = if self.transposed {
                    a[k * rows + row] * b[column * rank + k]
                } else {
                    b[row * rank + k] * a[k * columns + column]
                };
                sum += term;
                size += term.abs();
            }
            (scale * sum, scale.abs() * size)
        };
        let (sum, size) = product(&self.a, &self.b, self.rank, self.scale);
        match &self.removed {
            Some(Removed { scale, rank, a, b }) => {
                let (removed, removed_size) = product(a, b, *rank, *scale);
                (sum - removed, size + removed_size)
            }
            None => (sum, size),
        }
    }

    /// How many terms an element's sum has.
    fn steps(&self) -> usize {
        self.rank + self.removed.as_ref().map_or(0, |removed| removed.rank)
    }

    /// The row of the tensor that stands in for W₀, where one does.
    fn own_row(&self, row: usize, columns: usize) -> Option<&[f64]> {
        let row = row - self.row_range.start;
        self.base_override.as_ref().map(|tensor| &tensor[row * columns..(row + 1) * columns])
    }
}

impl<'a> ExactRow<'a> {
    /// # Errors
    /// [`crate::Error::Io`] where norms need the whole tensor.
    pub fn new(
        computer: Computer<'a>,
        planned: &'a PlannedTensor,
        prepared: &'a Prepared,
        Tolerance { peft, arithmetic }: Tolerance,
    ) -> Result<Self> {
        let (_, columns) = planned.matrix();
        let split = arithmetic == Arithmetic::SplitFactors
            && matches!(planned.source.dtype, Dtype::Bf16 | Dtype::F16);
        let mut this = Self {
            computer,
            planned,
            prepared,
            columns,
            tile: (0..0, Vec::new()),
            terms: Vec::new(),
            peft,
            split: if split { (PRODUCT_ERROR, 3.0) } else { (0.0, 1.0) },
            decomposition: 0.0,
        };
        if peft && planned.updates().iter().any(|update| update.residual.is_some()) {
            // LAPACK's backward error is some units of the largest singular value, and more in
            // components that are near to one another.
            this.decomposition = 64.0 * this.computer.weight(planned)?.largest() * 2f64.powi(-24);
        }
        let mut removed = this.computer.removed(planned)?.into_iter();
        for update in planned.updates() {
            let mut term = this.read(update)?;
            if let Some(residual) = update.residual {
                let (_, pair) = removed.next().expect("one for each update that has a residual");
                term.removed = Some(Removed {
                    scale: residual.scale(update.scale),
                    rank: pair.rank,
                    a: widen_f64(&pair.a_dtype, &pair.a),
                    b: widen_f64(&pair.b_dtype, &pair.b),
                });
            }
            if update.kind == UpdateKind::Transform {
                term.a = this.transformed(update, &term)?;
            }
            if update.kind == UpdateKind::Dora && update.orientation() == Orientation::InOut {
                term.column_scales = this.column_scales(&term)?;
            }
            this.terms.push(term);
        }
        Ok(this)
    }

    fn read(&self, update: &Update) -> Result<Term> {
        let adapter = &self.computer.inputs.adapters[update.adapter];
        let mut term = Term {
            adapter: update.adapter,
            kind: update.kind,
            stage: update.stage,
            weight: update.weight,
            scale: update.scale,
            rank: update.rank as usize,
            transposed: update.transposed,
            row_range: match &update.slice.rows {
                Some(row_range) => row_range.start as usize..row_range.end as usize,
                None => 0..self.planned.matrix().0,
            },
            a: Vec::new(),
            b: Vec::new(),
            column_scales: Vec::new(),
            magnitude: Vec::new(),
            base_override: None,
            removed: None,
        };
        let first = update.slice.outputs.as_ref().map_or(0, |rows| rows.start as usize);
        if update.kind == UpdateKind::Replace {
            let tensor = adapter.tensor(&update.module).expect("planned from this tensor");
            let row = self.columns * tensor.dtype.size();
            let bytes = (first * row) as u64..((first + term.row_range.len()) * row) as u64;
            term.a = widen_f64(&tensor.dtype, &tensor.read_range(bytes)?);
            return Ok(term);
        }
        if update.kind == UpdateKind::Transform {
            return Ok(term);
        }
        let pair = update.pair(adapter)?;
        term.a = widen_f64(&pair.a_dtype, &pair.a);
        term.b = widen_f64(&pair.b_dtype, &pair.b);
        if let (UpdateKind::Dora, Some(magnitude)) =
            (update.kind, &adapter.modules()[&update.module].magnitude)
        {
            term.magnitude = magnitude.read_f64()?.split_off(first);
        }
        if let Some(tensor) = &update.base_override {
            let tensor = adapter.tensor(tensor).expect("planned from this tensor");
            term.base_override = Some(tensor.read_f64()?.split_off(first * self.columns));
        }
        Ok(term)
    }

    /// Reads rows of W₀, which are at hand until others are read.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read_tile(&mut self, rows: &Range<usize>) -> Result<&[u8]> {
        let row = self.columns * self.planned.source.dtype.size();
        self.tile.0 = 0..0;
        self.tile.1.resize(rows.len() * row, 0);
        self.computer.read(self.planned, &mut self.tile.1, rows.start * row)?;
        self.tile.0 = rows.clone();
        Ok(&self.tile.1)
    }

    /// W₀'s row.
    fn base(&self, row: usize) -> Result<Vec<f64>> {
        let dtype = &self.planned.source.dtype;
        let length = self.columns * dtype.size();
        let (rows, read) = &self.tile;
        if rows.contains(&row) {
            return Ok(widen_f64(dtype, &read[(row - rows.start) * length..][..length]));
        }
        let mut bytes = vec![0; length];
        let offset = row * bytes.len();
        self.computer.read(self.planned, &mut bytes, offset)?;
        Ok(widen_f64(dtype, &bytes))
    }

    /// What a transform makes of all of its rows.
    fn transformed(&self, update: &Update, term: &Term) -> Result<Vec<f64>> {
        let mut start = Vec::with_capacity(term.row_range.len());
        for row in term.row_range.clone() {
            self.computer.task.check()?;
            start.push(self.row(row, &self.base(row)?, term.stage, |_, _| {})?.0);
        }
        let module = &self.computer.inputs.adapters[update.adapter].modules()[&update.module];
        let formula = module.delta.transform().expect("planned from it").formula();
        let (rows, columns, outputs) = (start.len(), self.columns, update.slice.outputs.as_ref());
        match update.orientation() {
            Orientation::OutIn => {
                let weight = |row: usize, column: usize| start[row][column];
                transforms::exact(formula, &weight, [rows, columns], update.scale, outputs)
            }
            Orientation::InOut => {
                let weight = |row: usize, column: usize| start[column][row];
                let turned =
                    transforms::exact(formula, &weight, [columns, rows], update.scale, outputs)?;
                let row = |row: usize| turned.iter().skip(row).step_by(rows);
                Ok((0..rows).flat_map(row).copied().collect())
            }
        }
    }

    fn column_scales(&self, term: &Term) -> Result<Vec<f64>> {
        let columns = self.columns;
        let mut squares = vec![0.0; columns];
        for row in term.row_range.clone() {
            self.computer.task.check()?;
            let start = self.row(row, &self.base(row)?, term.stage, |_, _| {})?.0;
            let start = term.own_row(row, columns).unwrap_or(&start);
            for (column, weight) in start.iter().enumerate() {
                let value = weight + term.product(row, column, columns).0;
                squares[column] += value * value;
            }
        }
        Ok(term.magnitude.iter().zip(squares).map(|(m, square)| m / square.sqrt()).collect())
    }

    /// Holds a stored row against the exact one: what rounding did, or the first column that is
    /// outside the bound and how. `rounding` is what storing the exact value of a column may change.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn compare(
        &mut self,
        row: usize,
        stored: &[f64],
        rounding: &dyn Fn(usize, f64) -> f64,
    ) -> Result<Result<Change, (usize, String)>> {
        let base = self.base(row)?;
        let mut change = Change { rows: 1, ..Change::default() };
        let (exact, sizes) =
            self.row(row, &base, usize::MAX, |adapter, delta| change.add_delta(adapter, delta))?;
        let (split, products) = self.split;
        let steps = self.terms.iter().map(|term| term.steps() + 4).sum::<usize>() as f64 * products;
        let single = self.planned.source.dtype != Dtype::F64;
        let gamma = (steps + 4.0) * if single { 2f64.powi(-24) } else { 2f64.powi(-53) };
        let roundings = if self.peft { PEFT_ROUNDINGS * self.terms.len() } else { 0 } as f64;
        for (column, ((stored, exact), (size, base))) in
            stored.iter().zip(&exact).zip(sizes.iter().zip(&base)).enumerate()
        {
            if !base.is_finite() && !stored.is_finite() {
                continue;
            }
            let dtype = &self.planned.output_dtype;
            let again = if roundings > 0.0 { roundings * half_ulp(dtype, *size) } else { 0.0 };
            let split = split * (size - base.abs());
            let bound =
                rounding(column, *exact) + again + gamma * size + split + self.decomposition;
            let error = (stored - exact).abs();
            // A NaN is no error that could be within the bound.
            if error.is_nan() || error > bound {
                let delta = exact - base;
                let hint = if stored == base && delta != 0.0 {
                    "; it is the base's value, as if nothing had been merged".to_owned()
                } else if delta.abs() > 64.0 * bound {
                    format!(
                        "; the stored change is {:.4} times the right one",
                        (stored - base) / delta
                    )
                } else {
                    String::new()
                };
                return Ok(Err((
                    column,
                    format!("is {stored:e} instead of {exact:e} (± {bound:.1e}){hint}"),
                )));
            }
            let delta = exact - base;
            change.error += error * error;
            change.delta += delta * delta;
            change.moving += u64::from(delta != 0.0);
            change.unmoved += u64::from(delta != 0.0 && stored == base);
        }
        Ok(Ok(change))
    }

    /// The exact row after all stages below `end`, and for each element the sum of the sizes of its
    /// terms. `each` gets the sum of squares of what each term changes, with its adapter.
    fn row(
        &self,
        row: usize,
        base: &[f64],
        end: usize,
        mut each: impl FnMut(usize, f64),
    ) -> Result<(Vec<f64>, Vec<f64>)> {
        let mut exact = base.to_vec();
        let mut sizes: Vec<_> = base.iter().map(|value| value.abs()).collect();
        if matches!(self.planned.action, Action::MergeEntries(_)) && end == usize::MAX {
            self.add_entries(row, base, (&mut exact, &mut sizes), each)?;
            return Ok((exact, sizes));
        }
        for stage in self.terms.chunk_by(|left, right| left.stage == right.stage) {
            if stage[0].stage >= end {
                break;
            }
            let (start, start_sizes) = (exact.clone(), sizes.clone());
            for term in stage.iter().filter(|term| term.row_range.contains(&row)) {
                let before = exact.clone();
                let start = (&start[..], &start_sizes[..]);
                self.add(term, term.weight, row, start, (&mut exact, &mut sizes));
                let changes = exact.iter().zip(&before).map(|(after, before)| after - before);
                each(term.adapter, changes.map(|change| change * change).sum());
            }
        }
        Ok((exact, sizes))
    }

    /// Adds what an entry-wise method makes of the products. Which elements it takes is decided by their
    /// values as the kernels made them, which have to be the products within the bound.
    fn add_entries(
        &self,
        row: usize,
        base: &[f64],
        (exact, sizes): (&mut [f64], &mut [f64]),
        mut each: impl FnMut(usize, f64),
    ) -> Result<()> {
        let dtype = queue::accumulator(&self.planned.source.dtype);
        let segment = self.prepared.segment(&(row..row + 1));
        let found = segment.entries_of(row, &dtype, &|row| self.base(row))?;
        let Some(MergedRow { merged, own: products }) = found else { return Ok(()) };
        let unit = if dtype == Dtype::F64 { 2f64.powi(-53) } else { 2f64.powi(-24) };
        let mut products = products.into_iter();
        let terms: Vec<&Term> =
            self.terms.iter().filter(|term| term.row_range.contains(&row)).collect();
        for own in terms.chunk_by(|left, right| left.adapter == right.adapter) {
            let product = products.next().expect("one for each adapter");
            let steps: usize = own.iter().map(|term| term.steps() + 4).sum();
            let mut square = 0.0;
            // W' − W₀ where it is more than a product, and the sizes of its terms.
            let is_more = own.iter().any(|term| term.kind.is_override());
            let base_sizes: Vec<f64> = base.iter().map(|value| value.abs()).collect();
            let (mut own_exact, mut own_sizes) = (base.to_vec(), base_sizes.clone());
            for term in own.iter().filter(|_| is_more) {
                self.add(term, 1.0, row, (base, &base_sizes), (&mut own_exact, &mut own_sizes));
            }
            for (column, value) in product.iter().enumerate() {
                let (mut sum, mut size) = (0.0, 0.0);
                for term in own.iter().filter(|_| !is_more) {
                    let (one, one_size) = term.product(row, column, self.columns);
                    sum += one;
                    size += one_size;
                }
                if is_more {
                    (sum, size) = (own_exact[column] - base[column], own_sizes[column]);
                }
                if (value - sum).abs() > steps as f64 * unit * size {
                    // No sum with it is right.
                    exact[column] = f64::NAN;
                }
                square += (own[0].weight * value).powi(2);
            }
            each(own[0].adapter, square);
        }
        for ((exact, size), merged) in exact.iter_mut().zip(sizes).zip(merged) {
            *exact += merged;
            *size += merged.abs();
        }
        Ok(())
    }

    /// Adds w·(W' − W₀) of one term to a row, and the sizes of what it is made of.
    fn add(
        &self,
        term: &Term,
        weight: f64,
        row: usize,
        (start, start_sizes): (&[f64], &[f64]),
        (exact, sizes): (&mut [f64], &mut [f64]),
    ) {
        let columns = self.columns;
        match term.kind {
            UpdateKind::LowRank | UpdateKind::Vector => {
                for column in 0..columns {
                    let (sum, size) = term.product(row, column, columns);
                    exact[column] += weight * sum;
                    sizes[column] += weight.abs() * size;
                }
            }
            UpdateKind::Dora => {
                let own = term.own_row(row, columns);
                let values: Vec<_> = (0..columns)
                    .map(|column| {
                        let (sum, size) = term.product(row, column, columns);
                        let (first, first_size) = match own {
                            Some(own) => (own[column], own[column].abs()),
                            None => (start[column], start_sizes[column]),
                        };
                        (first + sum, first_size + size)
                    })
                    .collect();
                let norm = values.iter().map(|(value, _)| value * value).sum::<f64>().sqrt();
                for (column, (value, size)) in values.into_iter().enumerate() {
                    let scale = match term.column_scales.get(column) {
                        Some(scale) => *scale,
                        None => term.magnitude[row - term.row_range.start] / norm,
                    };
                    exact[column] += weight * (scale * value - start[column]);
                    let size = scale.abs() * size + start_sizes[column];
                    sizes[column] += weight.abs() * size;
                }
            }
            UpdateKind::Replace | UpdateKind::Transform => {
                let stored = (row - term.row_range.start) * columns;
                for column in 0..columns {
                    let value = term.a[stored + column];
                    exact[column] += weight * (value - start[column]);
                    let size = value.abs() + start_sizes[column];
                    sizes[column] += weight.abs() * size;
                }
            }
        }
    }
}

/// Half a unit in the last place of `dtype` at `value`, in its subnormal range too.
pub(super) fn half_ulp(dtype: &Dtype, value: f64) -> f64 {
    HalfUlp::of(dtype).at(value)
}

/// Half a unit in the last place of one type, by the exponent of the value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HalfUlp {
    precision: u64,
    /// The exponent of the type's smallest normal numbers, biased as in f64.
    least: u64,
}

impl HalfUlp {
    /// For that type.
    pub fn of(dtype: &Dtype) -> Self {
        let (precision, least) = match dtype {
            Dtype::F64 => (53, 1),
            Dtype::F16 => (11, 1023 - 14),
            Dtype::Bf16 => (8, 1023 - 126),
            Dtype::F32 | Dtype::Other(_) => (24, 1023 - 126),
        };
        Self { precision, least }
    }

    /// At a finite value, without a branch: it is asked for once for every weight of a model. Of an
    /// f64 below 2⁻⁹⁶⁹ it is f64's smallest normal number, which is more than it has to be.
    #[inline]
    pub fn at(self, value: f64) -> f64 {
        let exponent = ((value.to_bits() >> 52) & 0x7ff).max(self.least);
        f64::from_bits(exponent.saturating_sub(self.precision).max(1) << 52)
    }
}
