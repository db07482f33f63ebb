from __future__ import annotations
import torch
from torch import nn, Tensor
from sparse_attn import AdaptiveSparseMultiheadAttention as A, TopKMultiheadAttention as T
ATTENTION_KINDS = ("softmax", "entmax15", "sparsemax", "entmax", "adaptive", "topk")
def make(kind, dim, heads, dropout, alpha, k):
    if kind not in ATTENTION_KINDS: raise ValueError(f"attention must be one of {ATTENTION_KINDS}, got {kind!r}")
    if kind=="topk": return T(dim, heads, dropout=dropout, batch_first=True, k=k)
    fixed={"softmax":1.0,"entmax15":1.5,"sparsemax":2.0}.get(kind, alpha)
    return A(dim, heads, dropout=dropout, batch_first=True, alpha_init=fixed, learn_alpha=kind=="adaptive")
class Layer(nn.Module):
    def __init__(s, dim, heads, ff, dropout, sk, ck, alpha, k):
        super().__init__()
        s.self_attention=make(sk,dim,heads,dropout,alpha,k); s.n1=nn.LayerNorm(dim)
        if ck: s.cross_attention=make(ck,dim,heads,dropout,alpha,k); s.n2=nn.LayerNorm(dim)
        s.cross=bool(ck)
        s.ff=nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim,ff), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ff,dim)); s.d=nn.Dropout(dropout)
    def forward(s,x,pad,causal=None,mem=None,mpad=None):
        h=s.n1(x); x=x+s.d(s.self_attention(h,h,h,key_padding_mask=pad,attn_mask=causal,need_weights=False)[0])
        if s.cross: x=x+s.d(s.cross_attention(s.n2(x),mem,mem,key_padding_mask=mpad,need_weights=False)[0])
        return x+s.d(s.ff(x))
class Stack(nn.Module):
    def __init__(s, layers): super().__init__(); s.layers=nn.ModuleList(layers)
class Seq2SeqTransformer(nn.Module):
    def __init__(self, source_size: int, target_size: int, *, dim: int=128, num_heads: int=4, ff_dim: int=512, encoder_layers: int=2, decoder_layers: int=2, dropout: float=0.1,
                 encoder_attention: str="adaptive", decoder_attention: str="adaptive", cross_attention: str="adaptive", alpha: float=1.5, k: int=4):
        super().__init__()
        a=(alpha,k)
        self.se=nn.Embedding(source_size,dim); self.te=nn.Embedding(target_size,dim); self.pos=nn.Embedding(200,dim)
        self.encoder=Stack([Layer(dim,num_heads,ff_dim,dropout,encoder_attention,None,*a) for _ in range(encoder_layers)])
        self.decoder=Stack([Layer(dim,num_heads,ff_dim,dropout,decoder_attention,cross_attention,*a) for _ in range(decoder_layers)])
        self.out=nn.Linear(dim,target_size); self.ne=nn.LayerNorm(dim); self.nd=nn.LayerNorm(dim); self.drop=nn.Dropout(dropout)
        for e in (self.se,self.te,self.pos): nn.init.normal_(e.weight,std=dim**-0.5)
    def encode(self,s):
        x=self.drop(self.se(s)+self.pos.weight[:s.shape[1]])
        for l in self.encoder.layers: x=l(x,s==0)
        return self.ne(x)
    def forward(self,s,t):
        m=self.encode(s); x=self.drop(self.te(t)+self.pos.weight[:t.shape[1]])
        c=torch.ones(t.shape[1],t.shape[1],dtype=torch.bool,device=t.device).triu(1)
        for l in self.decoder.layers: x=l(x,t==0,c,m,s==0)
        return self.out(self.nd(x))
