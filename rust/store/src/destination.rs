//! A prefix of a store as a destination: claimed by one merge, filled shard by shard with a marker for each, and a
//! model once index and config are there, which come last.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use lorafast::error::Owner;
use lorafast::storage::file_names;
use lorafast::storage::sink::{Committed, Destination, FileMark, Request, Sink, StagedModel};
use lorafast::storage::source::Source;
use lorafast::storage::staging;
use lorafast::storage::store::Store;
use lorafast::{Error, Result};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, ObjectMeta, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize};

use crate::connection::Connection;
use crate::failure::{Action, explain};
use crate::runtime;
use crate::sink::{Receipt, Upload, UploadSink, Written, read_only};
use crate::source::{bare, look, stamp_of};
use crate::staged::Staged;
use crate::store::list_objects;

/// In the output: what unfinished merges leave.
const DIRECTORY: &str = ".lorafast";
/// In that: who writes there.
const CLAIM: &str = ".lorafast/claim";
/// Bytes of a side file that are in memory at a time.
const COPIED_AT_ONCE: usize = 1 << 20;

/// A prefix of a store in which models are made.
#[derive(Debug)]
pub struct ObjectDestination {
    connection: Arc<Connection>,
    root: PathBuf,
}

/// Who writes to an output.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    /// The job that it belongs to.
    job: String,
    /// The names of all that it writes.
    names: Vec<String>,
}

/// A shard that is there.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    bytes: u64,
    etag: Option<String>,
}

/// What was removed of unfinished merges.
#[derive(Debug, Default, Serialize)]
pub struct Cleaned {
    /// The names of what was removed.
    pub removed: Vec<String>,
    /// Whether a finished model lies there, which was left alone.
    pub holds_model: bool,
}

impl ObjectDestination {
    /// Where a connection leads to.
    pub fn new(connection: Arc<Connection>) -> Self {
        let root = connection.address.name();
        Self { connection, root }
    }
}

/// A place in a store, and what is asked of it.
#[derive(Debug, Clone)]
struct Place {
    connection: Arc<Connection>,
}

impl Place {
    fn object(&self, name: &str) -> Result<ObjectPath> {
        let prefix: &str = self.connection.address.path.as_ref();
        let whole = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        ObjectPath::parse(&whole).map_err(|error| {
            Error::output(&whole, format!("is no name in a store ({error}); rename the file"))
        })
    }

    /// What an object is, as far as its ETag tells it: another one's is another.
    fn mark(&self, name: &str, bytes: u64, etag: Option<&str>) -> Option<FileMark> {
        let stamp = stamp_of(&self.connection, &self.object(name).ok()?, bytes, Some(etag?), 0);
        Some(FileMark::of_stamp(&stamp))
    }

    /// The ETag of an object that was found in a listing: some stores have none there, and one with each
    /// object.
    fn etag_of(&self, name: &str, listed: &ObjectMeta) -> Result<Option<String>> {
        if listed.e_tag.is_some() {
            return Ok(listed.e_tag.clone());
        }
        Ok(look(&self.connection, &self.object(name)?)?.and_then(|found| found.e_tag))
    }

    fn shown(&self, name: &str) -> String {
        format!("{}/{name}", self.connection.shown(&self.connection.address.path))
    }

    fn list(&self) -> Result<BTreeMap<String, ObjectMeta>> {
        list_objects(&self.connection, &self.connection.address.path)
    }

    fn get(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let (path, clients) = (self.object(name)?, self.connection.clients()?);
        self.connection.ask(&path, Action::Read, async {
            match clients.objects.get_opts(&path, GetOptions::new()).await {
                Ok(found) => Ok(Some(found.bytes().await?.to_vec())),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    /// Writes a small object in the place of whatever is there.
    fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        let (path, clients) = (self.object(name)?, self.connection.clients()?);
        let payload = PutPayload::from(content.to_vec());
        let put = clients.objects.put_opts(&path, payload, PutOptions::default());
        self.connection.ask(&path, Action::Write, async { put.await.map(|_| ()) })
    }

    /// Writes a small object where there is none; whether that could be done. An answer that was lost on the
    /// way looks as if somebody else had been faster, so that what is there is read then.
    fn create(&self, name: &str, content: &[u8]) -> Result<Created> {
        let (path, clients) = (self.object(name)?, self.connection.clients()?);
        let options = PutOptions::from(PutMode::Create);
        let put = runtime::wait(&self.connection.stop, async {
            Ok(clients.objects.put_opts(&path, PutPayload::from(content.to_vec()), options).await)
        })?;
        match put {
            Ok(_) => Ok(Created::Fresh),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => {
                match self.get(name)? {
                    Some(found) if found == content => Ok(Created::Same),
                    Some(found) => Ok(Created::Other(found)),
                    // Removed meanwhile.
                    None => Ok(Created::Other(Vec::new())),
                }
            }
            Err(
                object_store::Error::NotImplemented { .. }
                | object_store::Error::NotSupported { .. },
            ) => self.put(name, content).map(|()| Created::Unconditional),
            Err(error) => match self.get(name) {
                Ok(Some(found)) if found == content => Ok(Created::Same),
                _ => Err(explain(&self.connection.address, &path, Action::Write, &error)),
            },
        }
    }

    fn remove(&self, names: impl IntoIterator<Item = String>) -> Result<()> {
        let clients = self.connection.clients()?;
        let paths = names.into_iter().map(|name| self.object(&name)).collect::<Result<Vec<_>>>()?;
        let address = &self.connection.address;
        runtime::wait(&self.connection.stop, async {
            let all = futures_util::stream::iter(paths.into_iter().map(Ok)).boxed();
            let mut removed = clients.objects.delete_stream(all);
            while let Some(one) = removed.next().await {
                match one {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => {
                        return Err(explain(address, &address.path, Action::Delete, &error));
                    }
                }
            }
            Ok(())
        })
    }
}

/// What became of a conditional write.
#[derive(Debug, PartialEq, Eq)]
enum Created {
    Fresh,
    /// The same bytes are there already: an earlier call's, or those of a request whose answer was lost.
    Same,
    Other(Vec<u8>),
    /// The store knows no conditions.
    Unconditional,
}

/// Whether it is what makes a prefix a model: its config or an index.
fn makes_a_model(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    let is_index = last.contains(".index") && last.ends_with(".json");
    matches!(last, "config.json" | "model_index.json") || is_index
}

impl Destination for ObjectDestination {
    fn root(&self) -> &Path {
        &self.root
    }

    fn resumes(&self) -> bool {
        true
    }

    fn begin(&self, request: Request) -> Result<Box<dyn StagedModel>> {
        let place = Place { connection: self.connection.clone() };
        self.connection.follow(&request.stop);
        if self.connection.clients()?.parts.is_none() {
            return Err(read_only(&self.connection, &self.connection.address.path));
        }
        for input in &request.stores {
            if self.connection.address.overlaps(&input.to_string_lossy()) {
                return Err(Error::output(
                    &self.root,
                    format!(
                        "lies within what is read, or around it ({}); give another output",
                        input.display()
                    ),
                ));
            }
        }
        let job = request.job.clone();
        let objects = place.list()?;
        let claimed = objects.contains_key(CLAIM).then(|| place.get(CLAIM)).transpose()?.flatten();
        let claim: Option<Claim> =
            claimed.as_deref().and_then(|found| serde_json::from_slice(found).ok());
        let is_own = claim.as_ref().is_some_and(|claim| claim.job == job);
        let others = || objects.keys().filter(|name| !name.starts_with(".lorafast/"));
        if claimed.is_some() && !is_own && !request.overwrite {
            return Err(Error::output(
                &self.root,
                "another merge is writing there, or did not finish; wait for it, run that one again, or remove what it \
                 left (lorafast clean)",
            ));
        }
        if claimed.is_none()
            && !request.overwrite
            && let Some(first) = others().next()
        {
            let what = if others().any(|name| makes_a_model(name)) {
                "holds a model"
            } else {
                "is not empty"
            };
            return Err(Error::output(
                &self.root,
                format!("{what} ({first}); allow it to be overwritten, or give another output"),
            ));
        }
        // What is not of a model stays; an adapter there would make loaders take the whole for one.
        if let Some(adapter) =
            others().find(|name| file_names::ADAPTER_FILES.contains(&name.as_str()))
        {
            return Err(Error::output(
                &self.root,
                format!("holds an adapter ({adapter}); give another output"),
            ));
        }
        let content = serde_json::to_vec(&Claim { job: job.clone(), names: request.names.clone() })
            .expect("plain data");
        let mut warnings = Vec::new();
        if !is_own {
            if claimed.is_some() {
                place.remove([CLAIM.to_owned()])?;
            }
            let mut created = place.create(CLAIM, &content)?;
            if created == Created::Fresh {
                // A store that knows no conditions lets the same be made twice.
                created = match place.create(CLAIM, &content)? {
                    Created::Fresh => Created::Unconditional,
                    other => other,
                };
            }
            match created {
                Created::Unconditional => warnings.push(format!(
                    "{}: the store writes without conditions, so that another merge to the same place at the same time \
                     cannot be excluded",
                    self.root.display()
                )),
                Created::Other(_) => {
                    return Err(Error::output(&self.root, "another merge is writing there at this moment"));
                }
                Created::Fresh | Created::Same => {}
            }
        }
        // Nobody may take new weights for the older model's.
        let older: Vec<_> = others().filter(|name| makes_a_model(name)).cloned().collect();
        place.remove(older)?;
        let mut finished = BTreeMap::new();
        let markers = format!("{DIRECTORY}/{}/", &job[..16.min(job.len())]);
        if is_own {
            for name in objects.keys().filter(|name| name.starts_with(&markers)) {
                let shard = name[markers.len()..].trim_end_matches(".json").to_owned();
                let marker = place
                    .get(name)?
                    .and_then(|found| serde_json::from_slice::<Marker>(&found).ok());
                let (Some(marker), Some(found)) = (marker, objects.get(&shard)) else { continue };
                let etag = place.etag_of(&shard, found)?;
                let is_same = etag.as_deref().map(bare) == marker.etag.as_deref().map(bare);
                if found.size == marker.bytes && is_same {
                    finished.insert(shard, Receipt { bytes: marker.bytes, etag });
                }
            }
        }
        let older = if request.overwrite { others().cloned().collect() } else { BTreeSet::new() };
        Ok(Box::new(StagedObjects {
            place,
            markers,
            finished,
            found: objects,
            kept: BTreeMap::new(),
            older,
            last: Vec::new(),
            written: Vec::new(),
            uploads: Arc::default(),
            warnings,
            is_fresh: !is_own,
            is_committed: false,
        }))
    }
}

/// A model in the making in a store. Dropped before it is committed, its claim and its finished shards stay, so that
/// the same merge completes it.
#[derive(Debug)]
struct StagedObjects {
    place: Place,
    /// Where the markers of this job lie.
    markers: String,
    /// Shards that an earlier call has written.
    finished: BTreeMap<String, Receipt>,
    /// All that lay there at the beginning.
    found: BTreeMap<String, ObjectMeta>,
    /// Shards of the older model that stay.
    kept: BTreeMap<String, FileMark>,
    /// What lay there before.
    older: BTreeSet<String>,
    /// What makes the output a model, by name; written at the end.
    last: Vec<(String, Vec<u8>)>,
    /// Everything else that was written, with its size.
    written: Vec<(String, u64)>,
    /// The shards that are finished, and what they are where the store tells that.
    uploads: Arc<Mutex<BTreeMap<String, Option<FileMark>>>>,
    warnings: Vec<String>,
    /// Whether the claim is this call's.
    is_fresh: bool,
    is_committed: bool,
}

impl StagedModel for StagedObjects {
    fn create(
        &mut self,
        name: &str,
        bytes: u64,
        _like: Option<&dyn Source>,
    ) -> Result<Box<dyn Sink>> {
        self.written.push((name.to_owned(), bytes));
        if let Some(finished) = self.finished.get(name).filter(|found| found.bytes == bytes) {
            let mark = self.place.mark(name, bytes, finished.etag.as_deref());
            lock(&self.uploads).insert(name.to_owned(), mark);
            return Ok(Box::new(Written));
        }
        let (place, uploads) = (self.place.clone(), self.uploads.clone());
        let (marker, name) = (format!("{}{name}.json", self.markers), name.to_owned());
        let upload = Upload::new(place.connection.clone(), place.object(&name)?, bytes);
        let finish = move |receipt: &Receipt| {
            let content = Marker { bytes: receipt.bytes, etag: receipt.etag.clone() };
            place.put(&marker, &serde_json::to_vec(&content).expect("plain data"))?;
            let mark = place.mark(&name, receipt.bytes, receipt.etag.as_deref());
            lock(&uploads).insert(name.clone(), mark);
            Ok(())
        };
        Ok(Box::new(UploadSink::new(upload, Box::new(finish))))
    }

    fn put(&mut self, name: &str, content: &[u8], _like: Option<&dyn Source>) -> Result<()> {
        if makes_a_model(name) {
            self.last.push((name.to_owned(), content.to_vec()));
            return Ok(());
        }
        self.written.push((name.to_owned(), content.len() as u64));
        self.place.put(name, content)
    }

    fn copy(&mut self, name: &str, source: &dyn Source, path: &Path) -> Result<()> {
        let length = source.stamp().length;
        let unread = |error| Owner::Checkpoint.unread(path, error);
        if makes_a_model(name) {
            let mut content = vec![0; length as usize];
            source.read_at(&mut content, 0).map_err(unread)?;
            self.last.push((name.to_owned(), content));
            return Ok(());
        }
        self.written.push((name.to_owned(), length));
        if length == 0 {
            return self.place.put(name, &[]);
        }
        let object = self.place.object(name)?;
        let upload = Upload::new(self.place.connection.clone(), object, length);
        let sink = UploadSink::new(upload, Box::new(|_| Ok(())));
        let mut buffer = vec![0; COPIED_AT_ONCE.min(length as usize)];
        let mut start = 0;
        while start < length {
            let part = &mut buffer[..COPIED_AT_ONCE.min((length - start) as usize)];
            source.read_at(part, start).map_err(unread)?;
            sink.write_at(part, start).map_err(|error| Error::io(self.place.shown(name), error))?;
            start += part.len() as u64;
        }
        Ok(())
    }

    fn keep(&mut self, files: &[(&str, FileMark)]) -> Result<bool> {
        for (name, mark) in files {
            let Some(found) = self.found.get(*name).filter(|found| found.size == mark.bytes) else {
                return Ok(false);
            };
            let etag = self.place.etag_of(name, found)?;
            if self.place.mark(name, found.size, etag.as_deref()) != Some(*mark) {
                return Ok(false);
            }
        }
        for (name, mark) in files {
            self.written.push(((*name).to_owned(), mark.bytes));
            self.kept.insert((*name).to_owned(), *mark);
        }
        Ok(true)
    }

    fn staged(&self) -> Arc<dyn Store> {
        let names = self.written.iter().map(|(name, _)| name.clone()).collect();
        Arc::new(Staged::new(self.place.connection.clone(), names, self.last.clone()))
    }

    fn discard(self: Box<Self>) {
        self.place.connection.follow(&Arc::default());
        let own: Vec<_> = self.written.iter().map(|(name, _)| name.clone()).collect();
        let markers = self.place.list().map(|objects| {
            objects.into_keys().filter(|name| name.starts_with(&self.markers)).collect::<Vec<_>>()
        });
        // Nothing can be done about a failure here; the markers go first, without which nothing is taken for
        // finished.
        let _ = markers.and_then(|markers| self.place.remove(markers));
        let _ = self.place.remove(own).and_then(|()| self.place.remove([CLAIM.to_owned()]));
    }

    fn commit(mut self: Box<Self>) -> Result<Committed> {
        let last = std::mem::take(&mut self.last);
        let all = self.written.iter().map(|(name, bytes)| (name.as_str(), *bytes));
        let all =
            all.chain(last.iter().map(|(name, content)| (name.as_str(), content.len() as u64)));
        self.place.put(staging::MANIFEST, &staging::encode_manifest(all))?;
        // Indexes first: a loader begins with the config.
        let (configs, indexes): (Vec<_>, Vec<_>) =
            last.into_iter().partition(|(name, _)| name.ends_with("config.json"));
        for (name, content) in indexes.iter().chain(&configs) {
            if let Created::Other(_) = self.place.create(name, content)? {
                let words = "was written by somebody else meanwhile; this model was not finished";
                return Err(Error::output(self.place.shown(name), words));
            }
        }
        self.is_committed = true;
        let mut warnings = std::mem::take(&mut self.warnings);
        let new: BTreeSet<_> = self
            .written
            .iter()
            .map(|(name, _)| name)
            .chain(indexes.iter().chain(&configs).map(|(name, _)| name))
            .collect();
        let stale = self.older.iter().filter(|name| {
            !new.contains(name)
                && name.as_str() != staging::MANIFEST
                && file_names::is_of_a_model(name)
        });
        let leftovers = self.place.list().map(|objects| {
            objects.into_keys().filter(|name| name.starts_with(".lorafast/")).collect::<Vec<_>>()
        });
        // The claim at the very end: markers without one belong to nobody.
        let cleared = leftovers.and_then(|mut leftovers| {
            leftovers.retain(|name| name != CLAIM);
            self.place.remove(stale.cloned().chain(leftovers))?;
            self.place.remove([CLAIM.to_owned()])
        });
        if let Err(error) = cleared {
            warnings.push(format!("what the merge leaves behind could not be removed: {error}"));
        }
        let finished = std::mem::take(&mut *lock(&self.uploads));
        let finished = finished.into_iter().filter_map(|(name, mark)| Some((name, mark?)));
        let marks = finished.chain(std::mem::take(&mut self.kept)).collect();
        Ok(Committed { warnings, marks, ..Committed::default() })
    }
}

impl Drop for StagedObjects {
    fn drop(&mut self) {
        // Where nothing is finished there is nothing to be completed.
        if !self.is_committed && self.is_fresh && lock(&self.uploads).is_empty() {
            self.place.connection.follow(&Arc::default());
            let side_files = self.written.iter().map(|(name, _)| name.clone());
            let written: Vec<_> = side_files.filter(|name| !self.older.contains(name)).collect();
            let _ = self.place.remove(written.into_iter().chain([CLAIM.to_owned()]));
        }
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what unfinished merges left below an address: claim, markers, and shards that no model has.
///
/// # Errors
/// Those of the store.
pub fn clean(connection: &Arc<Connection>) -> Result<Cleaned> {
    let place = Place { connection: connection.clone() };
    let objects = place.list()?;
    let is_left = |name: &&String| name.starts_with(".lorafast/");
    let holds_model = objects.keys().any(|name| !is_left(&name) && makes_a_model(name));
    let mut removed: Vec<_> = objects.keys().filter(is_left).cloned().collect();
    let claim = objects.contains_key(CLAIM).then(|| place.get(CLAIM)).transpose()?.flatten();
    let claim: Option<Claim> = claim.and_then(|found| serde_json::from_slice(&found).ok());
    if let Some(claim) = claim.filter(|_| !holds_model) {
        removed.extend(claim.names.into_iter().filter(|name| objects.contains_key(name)));
    }
    // The claim last, so that a second call finds what a first one left.
    removed.sort_by_key(|name| name == CLAIM);
    let (claims, others): (Vec<_>, Vec<_>) =
        removed.iter().cloned().partition(|name| name == CLAIM);
    place.remove(others)?;
    place.remove(claims)?;
    Ok(Cleaned { removed, holds_model })
}

/// Writes a small object below an address, in the place of whatever is there.
///
/// # Errors
/// Those of the store.
pub fn put(connection: &Arc<Connection>, name: &str, content: &[u8]) -> Result<()> {
    Place { connection: connection.clone() }.put(name, content)
}
