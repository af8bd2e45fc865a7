//! One row of a merged tensor in f64, with a bound on what a correct f32 merge may differ by.

use crate::dtype::Dtype;
use crate::error::Result;
use crate::execute::compute::Computer;
use crate::execute::queue;
use crate::kernel::Orientation;
use crate::kernel::convert::widen_f64;
use crate::plan::{Action, PlannedTensor, Update, UpdateKind};

use super::Change;

/// Computes rows of one tensor exactly, as far as f64 is exact.
pub(super) struct ExactRow<'a> {
    computer: Computer<'a>,
    planned: &'a PlannedTensor,
    columns: usize,
    terms: Vec<Term>,
}

/// One update, its factors widened.
struct Term {
    kind: UpdateKind,
    weight: f64,
    scale: f64,
    rank: usize,
    transposed: bool,
    a: Vec<f64>,
    b: Vec<f64>,
    /// DoRA's gain m/‖V‖ of each column, where the norms run over rows.
    column_gains: Vec<f64>,
    magnitude: Vec<f64>,
}

impl Term {
    /// Element (k, column) of the right factor and (row, k) of the left one, as they lie on the
    /// stored weight.
    fn product(&self, row: usize, column: usize, shape: (usize, usize)) -> (f64, f64) {
        let (rows, columns) = shape;
        let mut sum = 0.0;
        let mut size = 0.0;
        for k in 0..self.rank {
            let term = if self.transposed {
                self.a[k * rows + row] * self.b[column * self.rank + k]
            } else {
                self.b[row * self.rank + k] * self.a[k * columns + column]
            };
            sum += term;
            size += term.abs();
        }
        (self.scale * sum, self.scale.abs() * size)
    }
}

impl<'a> ExactRow<'a> {
    /// # Errors
    /// [`crate::Error::Io`] where norms need the whole tensor.
    pub fn new(computer: Computer<'a>, planned: &'a PlannedTensor) -> Result<Self> {
        let (_, columns) = queue::shape_of(planned);
        let Action::Merge(updates) = &planned.action else {
            unreachable!("only merged tensors are computed again")
        };
        let mut this = Self { computer, planned, columns, terms: Vec::new() };
        for update in updates {
            let mut term = this.read(update);
            if update.kind == UpdateKind::Dora && update.orientation() == Orientation::InOut {
                term.column_gains = this.column_gains(&term)?;
            }
            this.terms.push(term);
        }
        Ok(this)
    }

    fn read(&self, update: &Update) -> Term {
        let adapter = &self.computer.inputs.adapters[update.adapter];
        let mut term = Term {
            kind: update.kind,
            weight: update.weight,
            scale: update.scale,
            rank: update.rank as usize,
            transposed: update.transposed,
            a: Vec::new(),
            b: Vec::new(),
            column_gains: Vec::new(),
            magnitude: Vec::new(),
        };
        if update.kind == UpdateKind::Replace {
            let tensor = adapter.file().tensor(&update.module).expect("planned from this tensor");
            term.a = adapter.read_f64(tensor);
            return term;
        }
        let module = &adapter.modules()[&update.module];
        if update.kind == UpdateKind::Vector {
            term.a = vec![1.0];
            term.b = adapter.read_f64(module.bias.as_ref().expect("planned from its bias"));
            return term;
        }
        term.a = adapter.read_f64(&module.a);
        term.b = adapter.read_f64(&module.b);
        if let Some(magnitude) = &module.magnitude {
            term.magnitude = adapter.read_f64(magnitude);
        }
        term
    }

    /// W₀'s row.
    fn base(&self, row: usize) -> Result<Vec<f64>> {
        let dtype = &self.planned.source.dtype;
        let mut bytes = vec![0; self.columns * dtype.size()];
        let offset = row * bytes.len();
        self.computer.read(self.planned, &mut bytes, offset)?;
        Ok(widen_f64(dtype, &bytes))
    }

    fn shape(&self) -> (usize, usize) {
        queue::shape_of(self.planned)
    }

    fn column_gains(&self, term: &Term) -> Result<Vec<f64>> {
        let (rows, columns) = self.shape();
        let mut squares = vec![0.0; columns];
        for row in 0..rows {
            self.computer.task.check()?;
            for (column, weight) in self.base(row)?.into_iter().enumerate() {
                let value = weight + term.product(row, column, (rows, columns)).0;
                squares[column] += value * value;
            }
        }
        Ok(term.magnitude.iter().zip(squares).map(|(m, square)| m / square.sqrt()).collect())
    }

    /// Holds a stored row against the exact one: what rounding did, or the first column that is
    /// outside the bound and how.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn compare(
        &mut self,
        row: usize,
        stored: &[f64],
    ) -> Result<Result<Change, (usize, String)>> {
        let base = self.base(row)?;
        let (exact, sizes) = self.row(row, &base);
        let steps = self.terms.iter().map(|term| term.rank + 4).sum::<usize>() as f64;
        let single = self.planned.source.dtype != Dtype::F64;
        let gamma = (steps + 4.0) * if single { 2f64.powi(-24) } else { 2f64.powi(-53) };
        let mut change = Change { rows: 1, ..Change::default() };
        for (column, ((stored, exact), (size, base))) in
            stored.iter().zip(&exact).zip(sizes.iter().zip(&base)).enumerate()
        {
            if !base.is_finite() && !stored.is_finite() {
                continue;
            }
            let bound = half_ulp(&self.planned.output_dtype, *exact) + gamma * size;
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

    /// The exact row, and for each element the sum of the sizes of its terms.
    fn row(&self, row: usize, base: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let shape = self.shape();
        let mut exact = base.to_vec();
        let mut sizes: Vec<_> = base.iter().map(|value| value.abs()).collect();
        for term in &self.terms {
            match term.kind {
                UpdateKind::LowRank | UpdateKind::Vector => {
                    for column in 0..self.columns {
                        let (sum, size) = term.product(row, column, shape);
                        exact[column] += term.weight * sum;
                        sizes[column] += term.weight.abs() * size;
                    }
                }
                UpdateKind::Dora => {
                    let values: Vec<_> = (0..self.columns)
                        .map(|column| {
                            let (sum, size) = term.product(row, column, shape);
                            (base[column] + sum, base[column].abs() + size)
                        })
                        .collect();
                    let norm = values.iter().map(|(value, _)| value * value).sum::<f64>().sqrt();
                    for (column, (value, size)) in values.into_iter().enumerate() {
                        let gain = match term.column_gains.get(column) {
                            Some(gain) => *gain,
                            None => term.magnitude[row] / norm,
                        };
                        exact[column] += term.weight * (gain * value - base[column]);
                        let size = gain.abs() * size + base[column].abs();
                        sizes[column] += term.weight.abs() * size;
                    }
                }
                UpdateKind::Replace => {
                    for column in 0..self.columns {
                        let value = term.a[row * self.columns + column];
                        exact[column] += term.weight * (value - base[column]);
                        let size = value.abs() + base[column].abs();
                        sizes[column] += term.weight.abs() * size;
                    }
                }
            }
        }
        (exact, sizes)
    }
}

/// Half a unit in the last place of `dtype` at `value`, in its subnormal range too.
fn half_ulp(dtype: &Dtype, value: f64) -> f64 {
    let (precision, least) = match dtype {
        Dtype::F64 => (53, -1022),
        Dtype::F16 => (11, -14),
        Dtype::Bf16 => (8, -126),
        Dtype::F32 | Dtype::Other(_) => (24, -126),
    };
    let exponent = if value == 0.0 || !value.is_finite() {
        least
    } else {
        // Of an f64, whose own subnormals lie far below every `least` but its own.
        (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(least)
    };
    2f64.powi(exponent - precision)
}
