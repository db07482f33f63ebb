import torch
@torch.no_grad()
def greedy_decode(model, source, *, max_length):
    training=model.training; model.eval()
    t=torch.ones(len(source),1,dtype=torch.long,device=source.device); done=torch.zeros(len(source),dtype=torch.bool,device=source.device)
    for _ in range(max_length):
        n=model(source,t)[:,-1].argmax(-1); n=n.masked_fill(done,2); done|=n==2; t=torch.cat([t,n[:,None]],1)
        if done.all(): break
    model.train(training)
    out=[]
    for r in t[:,1:].tolist():
        out.append(r[:r.index(2)] if 2 in r else r)
    return out
