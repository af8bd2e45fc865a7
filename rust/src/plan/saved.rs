//! Parameters that an adapter brings whole: in the place of the base's, beside them, and with
//! another number of tokens.

use std::ops::ControlFlow;

use super::naming::Naming;
use super::planner::{Addition, Planner, TensorChange};
use super::ties;
use super::{Compat, Origin, Part, Strategy, Update, UpdateKind};
use crate::adapter::Saved;
use crate::error::Result;
use crate::kernel::{self, InstructionSet};
use crate::tensor::safetensors::{TensorFile, TensorInfo, same_bytes};

impl Planner<'_> {
    /// Puts a saved parameter in the place of the base's, or beside it.
    pub(super) fn replace(
        &mut self,
        position: usize,
        saved: &Saved,
        naming: &Naming<'_>,
        weight: f64,
    ) -> Result<(), String> {
        if self.options.subtract {
            return self.leave(position, saved);
        }
        if self.replace_in_pieces(position, saved, naming, weight)? {
            return Ok(());
        }
        // A head that the backbone does not have keeps the name that the whole model gives it.
        let name = naming.apply(&saved.path)?.unwrap_or_else(|| saved.path.clone());
        let name = self.name_in_tie(&name).unwrap_or(name);
        let trained_apart = saved.trained_apart;
        let Some(tensor) = self.source(&name).cloned() else {
            if !trained_apart {
                return Err(format!(
                    "its tensor {} fits nothing in the base and belongs to no module that its \
                     config saves (modules_to_save)",
                    saved.tensor.name
                ));
            }
            self.additions.entry(name).or_default().push((position, saved.tensor.info().clone()));
            return Ok(());
        };
        self.refuse_replacing(saved, &name)?;
        let both_float = tensor.dtype.is_mergeable() && saved.tensor.dtype.is_mergeable();
        if tensor.dtype != saved.tensor.dtype && !both_float {
            return Err(format!(
                "its tensor {} of type {} replaces {name}, which the base stores as {}: \
                 merge into the unquantised base instead",
                saved.tensor.name, saved.tensor.dtype, tensor.dtype
            ));
        }
        // Counters and masks: nothing that a weight could be put on.
        if !both_float && self.is_unchanged(saved, &name) {
            let reason = format!("is the base's own {name} again");
            self.waive(position, &saved.tensor.name, reason);
            return Ok(());
        }
        let outright = weight == 1.0 && self.stands_alone();
        if !(both_float || outright) {
            return Err(format!(
                "its tensor {} of type {} replaces {name} and cannot be weighted against it; use \
                 the strategy sequential",
                saved.tensor.name, saved.tensor.dtype
            ));
        }
        let (old, new) = (&tensor.shape, &saved.tensor.shape);
        let grows = ties::is_of_vocabulary(&name) && old.len() == new.len() && old[1..] == new[1..];
        let same = old == new;
        if !(same || grows && outright) {
            return Err(format!(
                "its tensor {} of shape {new:?} replaces {name} of shape {old:?}",
                saved.tensor.name
            ));
        }
        if !same {
            self.resize_vocabulary(old[0], new[0])?;
        } else if !trained_apart && self.is_unchanged(saved, &name) {
            let reason = format!("is the base's own {name} again");
            self.waive(position, &saved.tensor.name, reason);
            return Ok(());
        }
        for name in self.replaced_by(position, &name, trained_apart) {
            self.put(position, saved, name, weight)?;
        }
        Ok(())
    }

    /// Whether a parameter that was saved beside an update is only the base's own again. Then it
    /// replaces nothing, least of all what an earlier adapter added; in PEFT's merge it does.
    fn is_unchanged(&mut self, saved: &Saved, name: &str) -> bool {
        let Some(location) = self.base.tensors().get(name) else { return false };
        let base = self.base.at(*location);
        let (from, to) = (&base.dtype, &saved.tensor.dtype);
        let mergeable = from.is_mergeable() && to.is_mergeable();
        if self.options.compat == Some(Compat::Peft) && mergeable {
            return false;
        }
        let base = (&self.base.shards()[location.shard].file, base);
        let own = (saved.tensor.file().as_ref(), saved.tensor.info());
        let same = if from == to {
            same_bytes(base, own)
        } else if mergeable && from.size() < to.size() {
            same_widened(base, own)
        } else {
            Ok(false)
        };
        self.read(same).unwrap_or(false)
    }

    /// Puts a saved parameter in the place of one tensor.
    fn put(
        &mut self,
        position: usize,
        saved: &Saved,
        name: String,
        weight: f64,
    ) -> Result<(), String> {
        let adapter = &self.inputs.adapters[position];
        let replaces_outright = weight == 1.0 && self.stands_alone();
        let change = self.tensors.entry(name.clone()).or_default();
        // A parameter that two modules share can be in the file under either name, and under both.
        let by_name = |update: &Update| {
            let own = update.adapter == position && update.kind == UpdateKind::Replace;
            own.then(|| adapter.tensor(&update.module)).flatten()
        };
        let already = match &change.origin {
            Some((owner, tensor)) if *owner == position => adapter.tensor(&tensor.name),
            _ => change.updates.iter().find_map(by_name),
        };
        if let Some(other) = already {
            let same = other.has_same_bytes(&saved.tensor);
            if self.read(same) == Some(false) {
                return Err(format!(
                    "its tensors {} and {} differ, but both are {name}, which the base ties",
                    other.name, saved.tensor.name
                ));
            }
            let reason = format!("is {} again, both being {name}, which the base ties", other.name);
            self.waive(position, &saved.tensor.name, reason);
            return Ok(());
        }
        if replaces_outright {
            // Whatever earlier adapters did to it is gone, as when one is merged after the other.
            let replacement = TensorChange {
                origin: Some((position, saved.tensor.info().clone())),
                updates: Vec::new(),
            };
            let lost = std::mem::replace(change, replacement);
            if !lost.is_empty() {
                self.warnings.push(format!(
                    "{}: replaces {name}, which an earlier adapter changed; that change is lost",
                    self.inputs.adapters[position].path().display()
                ));
            }
            let reason = format!("what it makes of {name} is replaced by a later adapter");
            if let Some((owner, tensor)) = lost.origin {
                self.waive(owner, &tensor.name, reason.as_str());
            }
            for update in &lost.updates {
                self.waive_update(update, &reason);
            }
        } else {
            change.updates.push(Update {
                adapter: position,
                module: saved.tensor.name.clone(),
                kind: UpdateKind::Replace,
                rank: 0,
                scale: 1.0,
                weight,
                transposed: false,
                part: Part::default(),
                on: None,
                residual: None,
                stage: 0,
            });
        }
        Ok(())
    }

    /// Whether an adapter's parameter takes the place of the base's, rather than being weighed with
    /// those of others.
    fn stands_alone(&self) -> bool {
        self.inputs.adapters.len() == 1 || self.options.strategy == Strategy::Sequential
    }

    fn resize_vocabulary(&mut self, old: u64, new: u64) -> Result<(), String> {
        match self.vocabulary.replace((old, new)) {
            Some((_, other)) if other != new => {
                Err(format!("its saved tensors have {new} tokens, but others have {other}"))
            }
            _ => {
                self.notes.push(format!("the vocabulary changes from {old} to {new} tokens"));
                self.notes.dedup();
                Ok(())
            }
        }
    }

    /// What has to have another number of tokens once the vocabulary has, and was not replaced.
    pub(super) fn check_vocabulary(&mut self) {
        let Some((old, new)) = self.vocabulary else { return };
        let names: Vec<String> = self.base.tensors().keys().cloned().collect();
        for name in names {
            let tensor = self.base.tensor(&name).expect("one of the base's");
            let replaced = || self.tensors.get(&name).is_some_and(|change| change.origin.is_some());
            if ties::is_of_vocabulary(&name) && tensor.shape.first() == Some(&old) && !replaced() {
                self.problems.push(format!(
                    "the vocabulary changes from {old} to {new} tokens, but no adapter brings \
                     {name} of the new size; its module has to be among modules_to_save in training"
                ));
            }
        }
    }

    pub(super) fn decide_additions(&mut self) -> Vec<Addition> {
        let mut additions = Vec::new();
        for (name, mut sources) in std::mem::take(&mut self.additions) {
            if sources.len() > 1 && self.options.strategy != Strategy::Sequential {
                self.problems.push(format!(
                    "{} adapters bring {name}, which the base does not have, so that they cannot \
                     be weighted against it; merge one of them, or use the strategy sequential",
                    sources.len()
                ));
                continue;
            }
            if sources.len() > 1 {
                self.warnings.push(format!(
                    "{} adapters bring {name}, which the base does not have; the last one's is used",
                    sources.len()
                ));
            }
            let Some((adapter, source)) = sources.pop() else { continue };
            for (earlier, tensor) in sources {
                let reason = format!("a later adapter brings {name} as well");
                self.waive(earlier, &tensor.name, reason);
            }
            let path = self.inputs.adapters[adapter].path().display().to_string();
            self.notes.push(format!("{path}: brings {name}, which the base does not have"));
            let output_dtype = if source.dtype.is_mergeable() {
                self.options.dtype.clone().unwrap_or_else(|| self.usual_dtype())
            } else {
                source.dtype.clone()
            };
            additions.push(Addition {
                name,
                origin: Origin::Adapter(adapter),
                home: None,
                source,
                output_dtype,
                updates: Vec::new(),
            });
        }
        additions
    }
}

/// Whether a tensor holds the values of another of a narrower type with as many elements.
fn same_widened(
    (narrow_file, narrow): (&TensorFile, &TensorInfo),
    (wide_file, wide): (&TensorFile, &TensorInfo),
) -> Result<bool> {
    if narrow.elements() != wide.elements() {
        return Ok(false);
    }
    let (from, to) = (&narrow.dtype, &wide.dtype);
    let (mut stored, mut widened) = (Vec::new(), Vec::new());
    let (mut same, mut failure) = (true, None);
    wide_file.for_each_chunk(wide, &mut |start, bytes| {
        stored.resize(bytes.len() / to.size() * from.size(), 0);
        widened.resize(bytes.len(), 0);
        let first = start / to.size() as u64 * from.size() as u64;
        match narrow_file.read_into(narrow, first, &mut stored) {
            Ok(()) => {
                kernel::convert(InstructionSet::detect(), from, &stored, to, &mut widened);
                same = widened == bytes;
            }
            Err(error) => failure = Some(error),
        }
        if same && failure.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    failure.map_or(Ok(same), Err)
}
