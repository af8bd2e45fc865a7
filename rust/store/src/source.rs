//! An object as a source: pinned to what it was when it was opened, its first bytes kept, the rest read ahead.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use lorafast::storage::local::Stamp;
use lorafast::storage::source::{Requests, Source};
use lorafast::{Error, Result};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectMeta};
use sha2::{Digest, Sha256};

use crate::connection::{Clients, Connection};
use crate::failure::{Action, Words, explain};
use crate::read_ahead::ReadAhead;
use crate::spool::Spool;

/// Bytes that are asked for when an object is opened: a shard's header is 10 to 100 KiB.
pub(crate) const HEAD: u64 = 128 << 10;
/// Bytes that are read at once where nobody said what will be read.
const UNPLANNED: u64 = 1 << 20;
/// How many of those are kept.
const KEPT: usize = 8;
/// How often a body that is cut off is asked for again, from where it ended, where the store names no version.
const ATTEMPTS: usize = 5;

/// An object as it was when it was opened.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub connection: Arc<Connection>,
    pub path: ObjectPath,
    pub size: u64,
    /// What names its content, where the store has that.
    pub etag: Option<String>,
    modified: i64,
}

/// An `ETag` without what servers write around it.
pub(crate) fn bare(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

impl Pinned {
    pub fn new(connection: Arc<Connection>, path: ObjectPath, meta: &ObjectMeta) -> Self {
        let modified = meta.last_modified.timestamp();
        Self { connection, path, size: meta.size, etag: meta.e_tag.clone(), modified }
    }

    pub fn shown(&self) -> String {
        self.connection.shown(&self.path)
    }

    /// What the core holds against what it finds later.
    pub fn stamp(&self) -> Stamp {
        stamp_of(&self.connection, &self.path, self.size, self.etag.as_deref(), self.modified)
    }

    /// Whether an answer is about the same content.
    fn is_same(&self, meta: &ObjectMeta) -> bool {
        let same_version = match (&self.etag, &meta.e_tag) {
            (Some(own), Some(other)) => bare(own) == bare(other),
            _ => self.modified == meta.last_modified.timestamp(),
        };
        meta.size == self.size && same_version
    }

    fn changed(&self) -> Error {
        Error::store(
            self.shown(),
            "changed while it was read (another ETag); run again when nobody writes to it",
        )
    }

    /// Reads a range, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Store`] that names the object.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut content = Vec::with_capacity((range.end - range.start) as usize);
        self.read_into(range, &mut content).await?;
        Ok(content)
    }

    /// The same in the place of whatever a buffer holds.
    ///
    /// # Errors
    /// As [`Pinned::read`].
    pub async fn read_into(&self, range: Range<u64>, content: &mut Vec<u8>) -> Result<()> {
        content.clear();
        let mut attempt = 1;
        loop {
            let rest = range.start + content.len() as u64..range.end;
            match self.try_to_read(rest, content).await {
                Ok(()) => return Ok(()),
                Err(error) if attempt < ATTEMPTS && self.may_go_on(&error) => attempt += 1,
                Err(error) => return Err(error.into_core(self)),
            }
        }
    }

    /// Whether another request for what is missing may help: a body that ended early.
    fn may_go_on(&self, error: &ReadError) -> bool {
        matches!(error, ReadError::Cut)
            || self.etag.is_none() && matches!(error, ReadError::Body(_))
    }

    async fn try_to_read(
        &self,
        range: Range<u64>,
        content: &mut Vec<u8>,
    ) -> std::result::Result<(), ReadError> {
        let clients = self.connection.clients().map_err(ReadError::Own)?;
        // A weak one never matches.
        let etag = self.etag.clone().filter(|etag| !etag.starts_with("W/"));
        let options = GetOptions::new()
            .with_range(Some(GetRange::Bounded(range.clone())))
            .with_if_match(etag);
        let result =
            clients.objects.get_opts(&self.path, options).await.map_err(ReadError::Request)?;
        // Some servers ignore the condition.
        if !self.is_same(&result.meta) {
            return Err(ReadError::Changed);
        }
        let mut left = range.end - range.start;
        let mut body = result.into_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(ReadError::Body)?;
            let taken = piece.len().min(left as usize);
            content.extend_from_slice(&piece[..taken]);
            left -= taken as u64;
        }
        if left > 0 { Err(ReadError::Cut) } else { Ok(()) }
    }

    /// What the object is now.
    ///
    /// # Errors
    /// Those of the store.
    pub fn look(&self) -> Result<Option<ObjectMeta>> {
        look(&self.connection, &self.path)
    }
}

/// What an object is now; `None` where it is not there.
pub(crate) fn look(connection: &Connection, path: &ObjectPath) -> Result<Option<ObjectMeta>> {
    let clients = connection.clients()?;
    connection.ask(path, Action::Read, async {
        match clients.objects.get_opts(path, connection.look_options()).await {
            Ok(result) => Ok(Some(result.meta)),
            Err(error) if connection.is_absent(path, &error) => Ok(None),
            Err(error) => Err(error),
        }
    })
}

/// The stamp of what a store says of an object.
pub(crate) fn stamp_of(
    connection: &Connection,
    path: &ObjectPath,
    size: u64,
    etag: Option<&str>,
    modified: i64,
) -> Stamp {
    let mut hasher = Sha256::new();
    hasher.update(connection.shown(path).as_bytes());
    hasher.update([0]);
    match etag {
        Some(etag) => hasher.update(bare(etag).as_bytes()),
        None => hasher.update(modified.to_le_bytes()),
    }
    let digest = hasher.finalize();
    let part = |at: usize| u64::from_le_bytes(digest[at..at + 8].try_into().expect("eight bytes"));
    Stamp { length: size, modified: 0, identity: (part(0), part(8)) }
}

enum ReadError {
    Request(object_store::Error),
    Body(object_store::Error),
    Cut,
    Changed,
    Own(Error),
}

impl ReadError {
    fn into_core(self, object: &Pinned) -> Error {
        let explained = |error: &object_store::Error| {
            explain(&object.connection.address, &object.path, Action::Read, error)
        };
        match self {
            Self::Request(object_store::Error::Precondition { .. }) | Self::Changed => object.changed(),
            Self::Request(object_store::Error::NotFound { .. }) => object.changed(),
            Self::Request(error) | Self::Body(error) => explained(&error),
            Self::Cut => explained(&Words("could not be read: the answer ends early, again and again; check what lies between here and the store".into()).into_error()),
            Self::Own(error) => error,
        }
    }
}

/// An opened object.
#[derive(Debug)]
pub(crate) struct RemoteSource {
    object: Arc<Pinned>,
    /// Its first bytes, which came when it was opened.
    head: Bytes,
    /// What follows them and was read next: the rest of a long header.
    rest_of_head: OnceLock<Bytes>,
    ahead: OnceLock<Arc<ReadAhead>>,
    /// All of it, for what is read as a whole.
    spool: Option<Spool>,
    /// What was read without a plan.
    recent: Mutex<VecDeque<(u64, Bytes)>>,
}

/// An object's first bytes, and what the store says of it.
#[derive(Debug)]
pub(crate) struct Head {
    pub meta: ObjectMeta,
    content: Bytes,
}

impl Head {
    /// Asks for them with one request.
    pub async fn fetch(clients: &Clients, path: &ObjectPath) -> object_store::Result<Self> {
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(0..HEAD)));
        match clients.objects.get_opts(path, options).await {
            Ok(result) => {
                let meta = result.meta.clone();
                let length = meta.size.min(HEAD);
                let content = result.bytes().await?;
                if (content.len() as u64) < length {
                    return Err(
                        Words("could not be read: the answer ends early".into()).into_error()
                    );
                }
                Ok(Self { meta, content })
            }
            // An empty object has no range.
            Err(error) => {
                match clients.objects.get_opts(path, GetOptions::new().with_head(true)).await {
                    Ok(result) if result.meta.size == 0 => {
                        Ok(Self { meta: result.meta, content: Bytes::new() })
                    }
                    _ => Err(error),
                }
            }
        }
    }

    /// The same, waiting for the answer.
    ///
    /// # Errors
    /// [`Error::Io`] if it is not there, [`Error::Store`].
    pub fn fetch_now(connection: &Arc<Connection>, path: &ObjectPath) -> Result<Self> {
        let clients = connection.clients()?;
        connection.ask(path, Action::Read, Self::fetch(&clients, path))
    }
}

impl RemoteSource {
    /// Of an object of which these are the first bytes.
    pub fn new(
        connection: &Arc<Connection>,
        path: &ObjectPath,
        head: Head,
        is_spooled: bool,
    ) -> Self {
        let object = Arc::new(Pinned::new(connection.clone(), path.clone(), &head.meta));
        let spool = is_spooled.then(|| Spool::new(object.clone()));
        Self {
            object,
            head: head.content,
            rest_of_head: OnceLock::new(),
            ahead: OnceLock::new(),
            spool,
            recent: Mutex::default(),
        }
    }

    fn read_rest(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if let Some(spool) = &self.spool {
            return spool.read_at(buffer, offset);
        }
        if self.ahead.get().is_none() && offset == self.head.len() as u64 {
            // No more than was asked for: what follows is data, which has its time.
            let content = Bytes::from(self.fetch(offset..offset + buffer.len() as u64)?);
            buffer.copy_from_slice(&content);
            let _ = self.rest_of_head.set(content);
            return Ok(());
        }
        if let Some(ahead) = self.ahead.get()
            && ahead.covers(offset, buffer.len() as u64)
        {
            return ahead.read_at(buffer, offset);
        }
        self.read_unplanned(buffer, offset)
    }

    /// Reads what nobody told before: more than was asked for, of which the next read may be a part.
    fn read_unplanned(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let known = {
                let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
                let holds = |(start, content): &&(u64, Bytes)| {
                    *start <= at && at < start + content.len() as u64
                };
                recent.iter().rev().find(holds).cloned()
            };
            let (start, content) = match known {
                Some(known) => known,
                None => {
                    let length = UNPLANNED.max(end - at).min(self.object.size - at);
                    let content = Bytes::from(self.fetch(at..at + length)?);
                    let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
                    if recent.len() == KEPT {
                        recent.pop_front();
                    }
                    recent.push_back((at, content.clone()));
                    (at, content)
                }
            };
            let within = (at - start) as usize;
            let taken = (content.len() - within).min((end - at) as usize);
            let target = (at - offset) as usize;
            buffer[target..target + taken].copy_from_slice(&content[within..within + taken]);
            at += taken as u64;
        }
        Ok(())
    }

    fn fetch(&self, range: Range<u64>) -> Result<Vec<u8>> {
        crate::runtime::wait(&self.object.connection.stop, self.object.read(range))
    }
}

impl Source for RemoteSource {
    fn stamp(&self) -> Stamp {
        self.object.stamp()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.object.size);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut done, mut start) = (0, 0);
        for kept in [Some(&self.head), self.rest_of_head.get()].into_iter().flatten() {
            let at = offset + done as u64;
            if done < buffer.len() && at >= start && at < start + kept.len() as u64 {
                let from = (at - start) as usize;
                let length = (kept.len() - from).min(buffer.len() - done);
                buffer[done..done + length].copy_from_slice(&kept[from..from + length]);
                done += length;
            }
            start += kept.len() as u64;
        }
        if done < buffer.len() {
            let rest = self.read_rest(&mut buffer[done..], offset + done as u64);
            rest.map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        let meta = self.object.look().map_err(io::Error::other)?;
        Ok(meta.is_some_and(|meta| self.object.is_same(&meta)))
    }

    fn requests(&self, ranges: &[Range<u64>]) -> Requests {
        if let Some(spool) = &self.spool {
            return spool.requests();
        }
        let head = self.head.len() + self.rest_of_head.get().map_or(0, Bytes::len);
        ReadAhead::requests(ranges, head as u64, self.object.connection.budget.window())
    }

    fn is_local(&self) -> bool {
        false
    }

    fn will_read(&self, ranges: &[Range<u64>], stop: &Arc<AtomicBool>) {
        self.object.connection.follow(stop);
        if self.spool.is_none() {
            let ahead = self.ahead.get_or_init(|| Arc::new(ReadAhead::new(self.object.clone())));
            let rest = self.rest_of_head.get().map_or(0, Bytes::len);
            ahead.plan(ranges, (self.head.len() + rest) as u64);
        }
    }
}
