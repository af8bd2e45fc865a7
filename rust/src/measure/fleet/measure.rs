//! One opened adapter, its units of work, and what they add up to.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::read::{digest, read, room};
use super::record::{Counts, Modules, Record, Texts};
use super::{Level, NonFinite, Scanned};
use crate::adapter::format::AdapterSource;
use crate::adapter::{Adapter, Expert, zero};
use crate::error::{Error, Result};
use crate::measure::analysis;
use crate::measure::metrics::Shape;
use crate::measure::products::Product;
use crate::measure::spectrum::{Spectrum, Update, Values};
use crate::measure::statistics::{
    ElementType, Moments, SEGMENT, Summary, Tensor, segment_moments, summary_of,
};
use crate::parallel::task::Task;
use crate::storage::digest::{blake3_of, blake3_of_bytes};
use crate::tensor::safetensors::TensorInfo;

/// Files up to this size are read whole, by one thread; larger ones a module at a time, by all.
const SMALL: u64 = 8 << 20;
/// Elements of a tensor outside of modules (a saved embedding) that are one unit: a whole number
/// of the statistics' segments, so that the figures do not depend on it.
const PART: usize = SEGMENT << 6;

/// What one thread does at a time. Positions are those of `Open::modules` and of the header.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// The digest of the file.
    Digest,
    /// A module's product: the moments of its factors, and its spectrum.
    Module(usize),
    /// Elements from this one on of a tensor that is no factor.
    Part { tensor: usize, start: usize },
}

/// A product of a module.
struct Factors {
    /// The module's position in the adapter.
    module: usize,
    /// Which of the module's products.
    expert: Option<Expert>,
    /// The positions of A and B in the header.
    tensors: [usize; 2],
}

/// What was found so far.
#[derive(Default)]
struct Findings {
    blake3: Option<String>,
    /// For each tensor of the header the moments of its segments, by the first element.
    moments: HashMap<usize, Vec<(usize, Vec<Moments>)>>,
    spectra: HashMap<usize, Spectrum>,
    error: Option<Error>,
}

/// An opened adapter.
pub struct Open {
    position: usize,
    adapter: Adapter,
    /// The file whose digest is the adapter's, where it is not the one that is read.
    content: Option<std::path::PathBuf>,
    level: Level,
    modules: Vec<Factors>,
    units: Vec<Unit>,
    left: AtomicUsize,
    findings: Mutex<Findings>,
    notes: Vec<String>,
}

impl Open {
    /// Plans the work on an adapter.
    pub fn new(
        position: usize,
        adapter: Adapter,
        source: &AdapterSource,
        level: Level,
    ) -> Result<Self> {
        let tensors = &adapter.file().header().tensors;
        let positions: HashMap<&str, usize> = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.as_str(), index))
            .collect();
        let mut notes = Vec::new();
        for tensor in tensors {
            if ElementType::from_dtype(&tensor.dtype).is_none() {
                notes.push(analysis::without_statistics(tensor));
            }
        }
        let mut is_factor = vec![false; tensors.len()];
        let mut modules = Vec::new();
        for (index, module) in adapter.modules().values().enumerate() {
            let parts = module.delta.tensors();
            // What is one tensor stands for both factors.
            let tensors = [0, parts.len().min(2) - 1];
            let tensors = tensors.map(|part| positions[parts[part].1.name.as_str()]);
            if module.delta.has_product() {
                tensors.iter().for_each(|tensor| is_factor[*tensor] = true);
            }
            for expert in module.products() {
                modules.push(Factors { module: index, expert, tensors });
            }
        }
        let mut units = Vec::new();
        if level.reads_data() {
            // The longest unit of a large file begins first.
            units.push(Unit::Digest);
            units.extend((0..modules.len()).map(Unit::Module));
        }
        if level.moments {
            let others = tensors.iter().enumerate().filter(|(index, tensor)| {
                !is_factor[*index] && ElementType::from_dtype(&tensor.dtype).is_some()
            });
            for (index, tensor) in others {
                let starts = (0..(tensor.elements() as usize).max(1)).step_by(PART);
                units.extend(starts.map(|start| Unit::Part { tensor: index, start }));
            }
        }
        drop(positions);
        Ok(Self {
            position,
            content: source.pickle.as_ref().map(|pickle| pickle.path.clone()),
            level,
            modules,
            left: AtomicUsize::new(units.len()),
            units,
            findings: Mutex::default(),
            notes,
            adapter,
        })
    }

    /// The position of its source.
    pub fn position(&self) -> usize {
        self.position
    }

    fn product(&self, position: usize) -> Product<'_> {
        let Factors { module, expert, .. } = self.modules[position];
        Product { module: &self.adapter.modules()[module], expert }
    }

    /// All units, in the order in which they are best begun.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    fn length(&self) -> u64 {
        self.adapter.file().size()
    }

    /// Whether it is not worth being cut into units.
    pub fn is_small(&self) -> bool {
        self.units.is_empty() || self.length() <= SMALL
    }

    fn info(&self, tensor: usize) -> &TensorInfo {
        &self.adapter.file().header().tensors[tensor]
    }

    fn offset(&self, tensor: &TensorInfo) -> u64 {
        self.adapter.file().data_start() + tensor.range.start
    }

    /// Carries out all units on a file that is read at once.
    pub fn measure_whole(&self, buffer: &mut Vec<u8>, task: &Task) -> Result<()> {
        if !self.units.is_empty() {
            let bytes = read(&self.adapter, 0, self.length() as usize, buffer)?;
            let of = |tensor: usize| {
                let info = self.info(tensor);
                let start = self.offset(info) as usize;
                view(info, &bytes[start..start + info.bytes() as usize])
            };
            for unit in &self.units {
                task.check()?;
                match *unit {
                    Unit::Digest => self.keep_blake3(match &self.content {
                        Some(path) => blake3_of(path)?,
                        None => blake3_of_bytes(bytes),
                    }),
                    Unit::Module(module) => {
                        let [a, b] = self.modules[module].tensors;
                        self.measure_module(module, of(a)?, of(b)?)?;
                    }
                    Unit::Part { tensor, start } => {
                        let whole = of(tensor)?;
                        let end = whole.len().min(start + PART);
                        self.keep_moments(tensor, start, whole.slice(start, end));
                    }
                }
            }
        }
        task.advance(self.length());
        Ok(())
    }

    /// Carries out one unit, reading what it needs.
    pub fn measure(&self, unit: Unit, buffer: &mut Vec<u8>, task: &Task) -> Result<()> {
        let adapter = &self.adapter;
        match unit {
            Unit::Digest => self.keep_blake3(match &self.content {
                Some(path) => blake3_of(path)?,
                None => digest(adapter, self.length(), buffer)?,
            }),
            Unit::Module(module) => {
                let [a, b] = self.modules[module].tensors.map(|tensor| self.info(tensor));
                let (size, all) = (a.bytes() as usize, (a.bytes() + b.bytes()) as usize);
                let product = self.product(module);
                // Of many products in two tensors each is read for itself.
                if product.expert.is_some_and(|expert| expert.index > 0) {
                    self.measure_spectrum(module, None)?;
                } else {
                    let (first, second) = room(buffer, all).split_at_mut(size);
                    adapter.file().read_into(a, 0, first)?;
                    adapter.file().read_into(b, 0, second)?;
                    self.measure_module(module, view(a, first)?, view(b, second)?)?;
                    task.advance(all as u64);
                }
            }
            Unit::Part { tensor, start } => {
                let info = self.info(tensor);
                let size = element(info)?.size();
                let end = (info.elements() as usize).min(start + PART);
                let mut segments = Vec::new();
                for first in (start..end).step_by(SEGMENT) {
                    let count = (end - first).min(SEGMENT);
                    let offset = self.offset(info) + (first * size) as u64;
                    let bytes = read(adapter, offset, count * size, buffer)?;
                    segments.extend(segment_moments(&view(info, bytes)?));
                }
                task.advance(((end - start) * size) as u64);
                self.keep(|findings| {
                    findings.moments.entry(tensor).or_default().push((start, segments));
                });
            }
        }
        Ok(())
    }

    /// What is to be found of a product; of several in two tensors, that of the tensors with the
    /// first.
    fn measure_module(&self, module: usize, a: Tensor<'_>, b: Tensor<'_>) -> Result<()> {
        let Factors { expert, tensors, .. } = self.modules[module];
        if self.level.moments && expert.is_none_or(|expert| expert.index == 0) {
            let count = if tensors[0] == tensors[1] { 1 } else { 2 };
            for (tensor, values) in tensors.into_iter().zip([a, b]).take(count) {
                self.keep_moments(tensor, 0, values);
            }
        }
        let is_plain = self.product(module).module.delta.plain().is_some();
        self.measure_spectrum(module, is_plain.then_some([a, b]))
    }

    /// The spectrum of a product with these factors, or with those that its tensors make.
    fn measure_spectrum(&self, module: usize, plain: Option<[Tensor<'_>; 2]>) -> Result<()> {
        if !self.level.spectra {
            return Ok(());
        }
        let product = self.product(module);
        let spectrum = match plain {
            Some([a, b]) => {
                let (rows, columns, rank) = product.extents();
                let (left, right) = (Values::Stored(b), Values::Stored(a));
                Spectrum::of(&Update::new(rows, columns, rank, left, right, product.scaling())?)
            }
            None => match product.kronecker_spectrum()? {
                Some(spectrum) => spectrum,
                None => Spectrum::of(&product.read(&mut Vec::new())?.update()?),
            },
        };
        self.keep(|findings| {
            findings.spectra.insert(module, spectrum);
        });
        Ok(())
    }

    fn keep_blake3(&self, blake3: String) {
        self.keep(|findings| findings.blake3 = Some(blake3));
    }

    fn keep_moments(&self, tensor: usize, start: usize, values: Tensor<'_>) {
        let segments = segment_moments(&values);
        self.keep(|findings| findings.moments.entry(tensor).or_default().push((start, segments)));
    }

    fn keep(&self, change: impl FnOnce(&mut Findings)) {
        let mut findings = self.findings.lock().expect("no holder of the lock panics");
        change(&mut findings);
    }

    /// Notes that a unit is done; whether it was the last.
    pub fn finished(&self, result: Result<()>) -> bool {
        if let Err(error) = result {
            // A damaged file fails in many units; the first error tells it.
            self.keep(|findings| {
                findings.error.get_or_insert(error);
            });
        }
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// What all units found.
    pub fn result(&self) -> Result<Scanned> {
        let mut findings =
            std::mem::take(&mut *self.findings.lock().expect("no holder of the lock panics"));
        if let Some(error) = findings.error.take() {
            return Err(error);
        }
        self.adapter.check_unchanged()?;
        let tensors = &self.adapter.file().header().tensors;
        let mut of_tensors = Vec::with_capacity(tensors.len());
        let mut non_finite = Vec::new();
        let mut summaries = HashMap::new();
        for (index, tensor) in tensors.iter().enumerate() {
            let Some(mut parts) = findings.moments.remove(&index) else { continue };
            parts.sort_by_key(|(start, _)| *start);
            let segments: Vec<Moments> = parts.into_iter().flat_map(|(_, part)| part).collect();
            let (moments, summary) = summary_of(&segments);
            if summary.non_finite > 0 {
                non_finite.push(NonFinite {
                    name: tensor.name.clone(),
                    count: summary.count,
                    non_finite: summary.non_finite,
                });
            }
            summaries.insert(index, summary);
            of_tensors.push(moments);
        }
        let mut dtypes: Vec<String> =
            tensors.iter().map(|tensor| tensor.dtype.name().to_owned()).collect();
        dtypes.sort();
        dtypes.dedup();
        let kind = self.adapter.summary().get("type").and_then(|value| value.as_str());
        let semantics = self.adapter.semantics();
        let rule = match (semantics.names_scale, semantics.rank_stabilized) {
            (true, _) => "scale",
            (false, true) => "alpha/sqrt(r)",
            (false, false) => "alpha/r",
        };
        let texts = Texts {
            peft_type: kind.map(str::to_owned),
            base: self.adapter.semantics().base.clone(),
            scaling_rule: rule.to_owned(),
            dtypes: dtypes.join(" "),
            blake3: findings.blake3,
        };
        let counts = Counts {
            tensors: tensors.len(),
            parameters: tensors.iter().map(TensorInfo::elements).sum(),
            bytes: self.length(),
        };
        let values = self.level.moments.then(|| summary_of(&of_tensors).1);
        Ok(Scanned {
            zero_causes: self.zero_causes(&summaries, &findings.spectra)?,
            rescaled: (0..self.modules.len())
                .filter(|position| self.product(*position).module.magnitudes().is_some())
                .collect(),
            record: self.record(texts, counts, values.as_ref(), &summaries, &findings.spectra),
            non_finite,
            features: analysis::features(&self.adapter, false),
            notes: self.notes.clone(),
        })
    }

    /// The modules of which a merge changes nothing. Only where what was found may mean that is
    /// anything read again.
    fn zero_causes(
        &self,
        summaries: &HashMap<usize, Summary>,
        spectra: &HashMap<usize, Spectrum>,
    ) -> Result<Vec<(usize, String)>> {
        let mut causes = Vec::new();
        for (position, factors) in self.modules.iter().enumerate() {
            let product = self.product(position);
            let is_zero = |tensor| {
                summaries.get(&tensor).is_some_and(|found: &Summary| found.zero_share == 1.0)
            };
            let may_be = match spectra.get(&position) {
                Some(spectrum) => spectrum.spectral_norm == 0.0,
                None if self.level.moments => {
                    product.module.scaling == 0.0 || factors.tensors.into_iter().any(is_zero)
                }
                None => zero::is_told_by_headers(&self.adapter, product.module),
            };
            if may_be && let Some(cause) = product.zero_cause(&self.adapter, 0.0)? {
                causes.push((position, cause));
            }
        }
        Ok(causes)
    }

    fn record(
        &self,
        texts: Texts,
        counts: Counts,
        values: Option<&Summary>,
        summaries: &HashMap<usize, Summary>,
        spectra: &HashMap<usize, Spectrum>,
    ) -> Record {
        let mut modules = Modules::default();
        let mut shapes = Vec::with_capacity(self.modules.len());
        for (position, factors) in self.modules.iter().enumerate() {
            let product = self.product(position);
            let module = product.module;
            let (rows, columns, _) = product.extents();
            let rank = product.stored_rank();
            let (alpha, scaling) = (module.alpha, module.scaling);
            let shape = Shape { rows, columns, rank, alpha, scaling };
            let moments = match factors.tensors.map(|tensor| summaries.get(&tensor)) {
                [Some(a), Some(b)] => Some([a, b]),
                _ => None,
            };
            let kind = module.kind.name();
            modules.push(&product.name(), kind, &shape, moments, spectra.get(&position));
            shapes.push(shape);
        }
        let in_order: Vec<_> = (0..self.modules.len()).filter_map(|at| spectra.get(&at)).collect();
        let spectra = self.level.spectra.then_some(&in_order[..]);
        Record::new(texts, counts, modules, &shapes, values, spectra)
    }
}

fn element(info: &TensorInfo) -> Result<ElementType> {
    ElementType::from_dtype(&info.dtype).ok_or_else(|| {
        Error::Argument(format!("there are no statistics of the type {}", info.dtype))
    })
}

fn view<'a>(info: &TensorInfo, bytes: &'a [u8]) -> Result<Tensor<'a>> {
    Tensor::new(bytes, element(info)?)
}
